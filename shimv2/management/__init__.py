# SPDX-License-Identifier: Apache-2.0
"""A sandbox's management socket, as Kata has it: HTTP/1.1 for people and monitors, for root only.

Nothing but `listener` is imported before the first connection: an idle shim pays for a socket.
"""
