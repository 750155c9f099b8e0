# SPDX-License-Identifier: Apache-2.0
"""Virtual machines made ahead of time: templates that sandboxes are cloned from.

Nothing here is imported by a shim whose configuration has neither templates nor a VM cache.
"""
