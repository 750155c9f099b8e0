# SPDX-License-Identifier: Apache-2.0
"""The network of a pod: what is in its namespace on the host, carried into the guest.

::

    async with PodNetwork(namespace, settings) as network:
        ...                                # the VM is launched
        await network.plug(guest)          # NICs are there while the guest still boots
        ...                                # the agent answers
        await network.configure(guest)
        nursery.start_soon(network.follow, guest)

======================  ==========================================================
`netlink`               rtnetlink: messages and a socket
`snapshot`              what a namespace holds: links, addresses, routes, neighbours
`namespace`             a namespace from outside: read, and wired to the VM
`tap`, `macvtap`        descriptors that a VMM can have as a NIC
`links`                 changes to links and their traffic control
`traces`                what of us stands in the namespace, and its removal
`pod_network`           what of the namespace is in the guest, kept so
`to_agent`              the same as the agent's messages
`port_forward`          connections to loopback in the namespace, carried to the guest's
`loopback_redirect`     the BPF program that catches them
======================  ==========================================================
"""
