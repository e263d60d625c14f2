"""A parser of arguments whose errors are a line."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from fewstep_sr.weights.strict import printable

_LONGEST = 4000
"""Characters of an error's message."""


def bounded(text: str) -> str:
    """A message, however long the name in it is."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in a line, not behind thirty of usage, and which option comes nearest to one that does not exist."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {bounded(message)}\n{self.prog} --help lists the options.\n")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._chosen(sys.argv[1:] if args is None else args)._refuse(unknown[0])
        return found

    def _chosen(self, words: Sequence[str]) -> "Parser":
        """The parser of the command that the words name, of a command's command where there is one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for i, word in enumerate(words):
                    if word in action.choices:
                        return action.choices[word]._chosen(words[i + 1 :])
        return self

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"found {word[:100]!r}, which belongs to no option.")
        word = word.partition("=")[0]
        near = get_close_matches(word, self._option_string_actions, 1, 0.7)
        self.error(f"there is no option {printable(word)}. {f'Did you mean {near[0]}?' if near else ''}".rstrip())
