"""Rewards with mistakes, for the tests of what the command line says; a worker imports this module, so it is light."""

import time


def right(completion, example):
    return float(completion == example["answer"])


def raises(completion, example):
    raise KeyError("no such key")


def not_a_number(completion, example):
    return float("nan")


def hangs(completion, example):
    time.sleep(60.0)


def a_list(completion, example):
    return [0.0, 1.0]


def strange_parameter(text):
    return 0.0


def raises_in_the_graph(rollout, prompts):
    return prompts.example["nothing"]


def of_wrong_shape(rollout, prompts):
    return rollout.tokens[0]


def nan_in_the_graph(rollout, prompts):
    return rollout.tokens.sum(axis=1) * float("nan")
