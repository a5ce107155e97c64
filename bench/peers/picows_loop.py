"""picows with nothing around it: its Cython frames, a dict of lists, one ``send`` per member."""

# mypy: ignore-errors

from __future__ import annotations

import json
import sys
from collections import defaultdict

import uvloop
from picows import WSListener, WSMsgType, ws_create_server

members = defaultdict(dict)
TEXT = WSMsgType.TEXT


class Hub(WSListener):
    """Subscribe and send, with the messages of flockwire's plain protocol."""

    topics = ()

    def on_ws_connected(self, transport):
        """Keep the transport: members are transports."""
        self.topics = set()

    def on_ws_frame(self, transport, frame):
        """One whole text frame is one message."""
        if frame.msg_type != TEXT:
            control(transport, frame)
            return
        message = json.loads(frame.get_payload_as_bytes())
        kind, topic = message.pop("type"), message.pop("topic")
        if kind == "subscribe":
            self.topics.add(topic)
            members[topic][transport] = None
        elif kind == "send":
            payload = json.dumps(message).encode()
            for member in members[topic]:
                member.send(TEXT, payload)

    def on_ws_disconnected(self, transport):
        """Forget it everywhere."""
        for topic in self.topics:
            members[topic].pop(transport, None)


class Echo(WSListener):
    """Send back what came."""

    def on_ws_frame(self, transport, frame):
        """One whole text frame is one message."""
        if frame.msg_type == TEXT:
            transport.send(TEXT, frame.get_payload_as_bytes())
        else:
            control(transport, frame)


def control(transport, frame):
    """Answer a close; pings are answered by picows."""
    if frame.msg_type == WSMsgType.CLOSE:
        transport.send_close(frame.get_close_code())
        transport.disconnect()


async def main():
    """Serve until killed."""
    server = await ws_create_server(
        lambda request: Echo() if request.path == b"/echo" else Hub(),
        "127.0.0.1",
        int(sys.argv[1]),
        backlog=4096,
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
