#!/usr/bin/env python3
"""unpack-vmlinuz.py VMLINUZ VMLINUX: takes the ELF kernel out of a bzImage.

QEMU starts it by its PVH entry, which saves the test host from decompressing
it in emulated instructions. Fails where the kernel is packed with a method
that has no tool here; the caller then boots the bzImage.
"""
import struct
import subprocess
import sys

TOOLS = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"\x1f\x8b": "gzip"}


def main(source, target):
    with open(source, "rb") as f:
        image = f.read()
    setup_sects = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sects + 1) * 512 + offset
    payload = image[start:start + length - 4]  # the last word is the unpacked size
    tool = next((t for magic, t in TOOLS.items() if payload.startswith(magic)), None)
    if not tool:
        sys.exit(f"{source}: unknown compression")
    with open(target, "wb") as out:
        subprocess.run([tool, "-dcq"], input=payload, stdout=out, check=True)


main(*sys.argv[1:])
