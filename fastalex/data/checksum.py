"""CRC-32 of the pixels of an image."""

try:
    from isal.isal_zlib import crc32  # many times as fast as zlib's
except ImportError:  # where no one built it
    from zlib import crc32

__all__ = ["crc32"]
