// Socket.IO with its cluster adapter and sticky balancing, two workers, WebSocket transport only.
const cluster = require("node:cluster");
const http = require("node:http");
const { createRequire } = require("node:module");
const [port, workers, prefix] = process.argv.slice(2);
const load = createRequire(prefix + "/package.json");
const { Server } = load("socket.io");
const { createAdapter, setupPrimary } = load("@socket.io/cluster-adapter");
const { setupMaster, setupWorker } = load("@socket.io/sticky");

if (cluster.isPrimary) {
  const front = http.createServer();
  setupMaster(front, { loadBalancingMethod: "least-connection" });
  setupPrimary();
  cluster.setupPrimary({ serialization: "advanced" });
  let online = 0;
  for (let i = 0; i < Number(workers); i++) cluster.fork();
  cluster.on("message", (_, message) => {
    if (message === "ready" && ++online === Number(workers)) front.listen(Number(port), "127.0.0.1", 4096);
  });
} else {
  const io = new Server(http.createServer((_, answer) => answer.end("ok")), {
    transports: ["websocket"],
    perMessageDeflate: false,
    serveClient: false,
    pingInterval: 300000,
    maxHttpBufferSize: 1e6,
  });
  io.adapter(createAdapter());
  setupWorker(io);
  io.on("connection", (socket) => {
    socket.on("subscribe", ({ topic }) => socket.join(topic));
    socket.on("send", ({ topic, ...data }) => io.to(topic).emit("msg", data));
    socket.on("echo", (data) => socket.emit("msg", data));
  });
  process.send("ready");
}
