# SPDX-License-Identifier: Apache-2.0
"""The network of a pod: what is in its namespace on the host, carried into the guest.

::

    async with PodNetwork(namespace, settings) as network:
        ...                                # the VM is launched
        await network.plug(guest)          # NICs are there while the guest still boots
        ...                                # the agent answers
        await network.configure(guest)
        nursery.start_soon(network.follow, guest)

========================  ========================================================
`netlink`                 rtnetlink: messages and a socket
`snapshot`                what a namespace holds: links, addresses, routes, neighbours
`namespace`               a namespace from outside: reading it, making links in it
`tap`, `tcfilter`,        how frames get from an interface of the namespace to the VM
`macvtap`
`pod_network`             what of it is in the guest, kept so
`to_agent`                the same as the agent's messages
========================  ========================================================
"""
