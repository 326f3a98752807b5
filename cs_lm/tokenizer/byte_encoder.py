"""GPT-2's printable names for bytes, used in its `vocab.json` and `merges.txt`.

A printable Latin-1 character is its own name. The other 68 bytes get the characters from U+0100
on. For example, the name of a space is U+0120.
"""

from cs_lm.errors import UserError

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

NAME_OF_BYTE: dict[int, str] = {
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{byte: chr(0x100 + i) for i, byte in enumerate(_UNPRINTABLE)},
}
BYTE_OF_NAME: dict[str, int] = {name: byte for byte, name in NAME_OF_BYTE.items()}


def name_of_token(token: bytes) -> str:
    return "".join(NAME_OF_BYTE[byte] for byte in token)


def token_of_name(name: str) -> bytes:
    """The bytes of a name. Raises: UserError for a character that is not the name of a byte."""
    try:
        return bytes(BYTE_OF_NAME[character] for character in name)
    except KeyError as error:
        raise UserError(
            f"vocabulary: token {name!r} holds {error.args[0]!r}, which names no byte; "
            "need GPT-2's byte-level vocab.json and merges.txt"
        ) from None
