// Bun's publish and subscribe (uWebSockets inside), with the messages of flockwire's plain protocol.
const server = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.argv[2]),
  fetch(request, server) {
    const echo = new URL(request.url).pathname === "/echo";
    if (server.upgrade(request, { data: { echo } })) return;
    return new Response("ok");
  },
  websocket: {
    perMessageDeflate: false,
    idleTimeout: 960,
    message(socket, text) {
      if (socket.data.echo) {
        socket.send(text);
        return;
      }
      const { type, topic, ...data } = JSON.parse(text);
      if (type === "subscribe") socket.subscribe(topic);
      else if (type === "send") server.publish(topic, JSON.stringify(data));
    },
  },
});
