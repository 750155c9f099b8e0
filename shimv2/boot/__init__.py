# SPDX-License-Identifier: Apache-2.0
"""Starts of sandboxes: kept on the host, split into phases, and shown."""
