"""Named endpoints that send each other frames: a plain dict, and arrays beside it.

    endpoint     what a process has: it listens, dials, queues what is to be sent and holds what has come
    peer         a queue towards one other endpoint, of small or of large frames, and the thread that sends from it
    connection   one way between two endpoints: frames through a socket, large payloads through shared memory
    handshake    who is at the other end, proved by the job's token
    frame        the bytes of a frame, checked before they are believed (no sockets here)
    buffers      what frames are received into, lent until the last array that looks into it is gone
    credentials  the job's token and certificates as they are used; `certificates` makes them
    rendezvous   addresses as text, and the endpoint of a node by what its job is given
    plain        messages of a protocol as headers and arrays, checked when they come
    machine      what a protocol is made of: state machines without I/O, and what they want done
    node         drives one of them over an endpoint

Frames may be lost, doubled or overtaken by later ones when a connection breaks, and small and large ones overtake
each other always: they have connections of their own. A frame that arrives is whole. Nothing is unpickled. A payload
has no checksum of ours: TCP has one, TLS authenticates each record, and a CRC-32 would cost a third of the loopback's
bandwidth.
"""
