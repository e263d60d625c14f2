"""A look at a pickle's opcodes without following them: what weights have no use for is refused before anything of it is built."""

import pickletools
import re
from typing import BinaryIO

from .strict import Refused

MAX_OPCODES = 500_000
"""A tensor takes some 30, and a checkpoint of Stable Diffusion XL with its optimizer has 5,000 of them."""

MAX_NESTED_TUPLES = 64
"""Python hashes a tuple inside a tuple by recursion that nothing ends but the stack."""

# What PyTorch's reader would call, but weights have no use for.
_NOT_WEIGHTS = (
    (r"torch\._utils\._rebuild_sparse\w*", "sparse tensors"),
    (r"torch\._utils\._rebuild_qtensor|torch\.QU?Int\w*Storage", "quantized tensors"),
    (r"torch\._utils\._rebuild_nested_tensor", "nested tensors"),
    (r"torch\._utils\._rebuild_meta\w*", "tensors without numbers (on the device 'meta')"),
    (r"torch\._utils\._rebuild_(wrapper_subclass|device_tensor\w*)|torch\._tensor\._rebuild_from_type\w*", "tensors of a class of their own"),
    (r"builtins\.bytearray|_codecs\.encode", "bytes"),
    (r"torch\.(\w+\.)*\w*Tensor", "tensors in a form that torch.save does not write"),
)


def python_objects(name: str = "") -> Refused:
    """The refusal of a pickle that could run code."""
    found = f" ({name[:100]})" if name else ""
    return Refused(
        f"refused, because the pickle holds Python objects{found} that could run code; "
        "expected tensors, numbers and text alone. Use a safetensors file from a source you trust."
    )


def require_weights_alone(stream: BinaryIO, magic: int | None = None) -> tuple[set[str], set[str]]:
    """Go through a pickle's opcodes, to its end.

    Args:
        stream: at the pickle's first byte; at the end behind its last.
        magic: a number that must be in it.

    Returns:
        The texts in it, and the names of the classes and functions that it calls for.

    Raises:
        Refused: it calls for something that weights have no use for, or has too many opcodes.
        Exception: it is no pickle.
    """
    texts, names, seen_magic, values = set(), set(), magic is None, _Values()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise Refused(f"its pickle has more than {MAX_OPCODES:,} steps; expected tensors, numbers and text. The file is damaged.")
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise python_objects()
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")
            if not re.fullmatch(r"[\w.]{1,200}", name):  # PyTorch's message would quote it, and search it in quadratic time
                raise python_objects()
            if found := next((words for pattern, words in _NOT_WEIGHTS if re.fullmatch(pattern, name)), None):
                raise Refused(f"found {found} ({name[:100]}); expected dense tensors of floating-point numbers. Choose another file.")
            names.add(name)
        elif isinstance(argument, str):
            texts.add(argument)
        seen_magic |= magic is not None and argument == magic
        values.follow(opcode, argument)
    if not seen_magic:
        raise Refused("this pickle was not written by torch.save; expected a file of torch.save, or safetensors.")
    return texts, names


_GLOBAL = -1


class _Values:
    """What the pickle's values are, by a stack of numbers in their place (as ``pickletools.dis`` follows them).

    A number is how deep a tuple holds tuples, or :data:`_GLOBAL`, and None a mark.
    """

    def __init__(self):
        self.stack: list[int | None] = []
        self.memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument) -> None:
        taken: list[int] = []
        if pickletools.markobject in opcode.stack_before:
            while (depth := self.stack.pop()) is not None:
                taken.append(depth)
            pops = opcode.stack_before.index(pickletools.markobject)
        else:
            pops = len(opcode.stack_before)
        if pops:
            taken += [depth or 0 for depth in self.stack[-pops:]]
            del self.stack[-pops:]
        if opcode.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX") and taken[:1] != [_GLOBAL]:
            raise Refused("its pickle calls something that is no function; the file is damaged. Download it again.")
        if opcode.name == "GLOBAL":
            self.stack.append(_GLOBAL)
        elif opcode.name.startswith("TUPLE"):
            depth = 1 + max(taken, default=0)
            if depth > MAX_NESTED_TUPLES:
                raise Refused("its pickle has tuples in tuples without end; expected tensors, numbers and text. The file is damaged.")
            self.stack.append(depth)
        elif opcode.name.endswith("GET"):
            self.stack.append(self.memo.get(argument, 0))
        elif opcode.name.endswith("PUT"):
            self.memo[argument] = (self.stack[-1] if self.stack else 0) or 0
        else:
            self.stack += [None if after is pickletools.markobject else 0 for after in opcode.stack_after]
