"""The byte alphabet of byte-level BPE: every byte as one printable character.

Source: GPT-2's encoder.py (openai/gpt-2, bytes_to_unicode): printable Latin-1 stands for itself,
the other 68 bytes follow from U+0100 on in order.
"""


def _alphabet() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters: list[str] = []
    num_shifted = 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + num_shifted))
            num_shifted += 1
    return tuple(characters)


BYTE_TO_CHARACTER = _alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token outside the alphabet stands for its text."""
    try:
        return bytes([CHARACTER_TO_BYTE[character] for character in token])
    except KeyError:
        return token.encode()
