# SPDX-License-Identifier: Apache-2.0
"""Shims that need not import anything: forked from a process that has.

`nursery` is that process, `kata-vm-cache` keeps it; `hand_over` is what a shim's ``start`` asks
it by; `likeness` is what a process has from its parent, which such a shim must not have from
the nursery.  docs/templates.md, "Ready shims".
"""
