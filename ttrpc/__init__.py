# SPDX-License-Identifier: Apache-2.0
"""ttrpc: RPC with light framing over one byte stream, wire-compatible with containerd's.

`protocol` is the state machine without I/O, `envelope` the messages inside the frames, `errors`
the status codes; none of them imports trio. `client` and `server` run the protocol over any trio
stream.
"""
