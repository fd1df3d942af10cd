"""A kernel and an initramfs from LinuxKit's YAML, without a container registry and without root (spec companions 5, YAML (c)).

`sources` turns an image reference into a `tree`, `kernel` picks kernel and modules out of one, `init` adds what the machine runs,
`cpio` writes it all down, and `build` is all of them in a row.
"""
