// The peer process for nodemailer's pool: it reads a job in JSON from its only argument, and writes the result to its standard
// output, like peerMain in ../job.go.
import { readFileSync, writeFileSync } from "node:fs";
import nodemailer from "nodemailer";

const job = JSON.parse(process.argv[2]);
const sender = "bounces@client.example";
const recipient = "recipient@destination.example";
const header = job.header;
const numberAt = header.indexOf("<000") + 1;
const line = "Sphinx of black quartz, judge my vow, and pack my box with jugs.\r\n";

function newMessage(size) {
  const left = Math.max(size - header.length, 2);
  const text = Buffer.alloc(left, line, "latin1");
  text.write("\r\n", left - 2, "latin1");
  return Buffer.concat([Buffer.from(header, "latin1"), text]);
}

// stream yields message n in pieces, so that it is never in memory as a whole.
async function* stream(size, n) {
  yield Buffer.from(header.slice(0, numberAt) + String(n).padStart(16, "0") + header.slice(numberAt + 16), "latin1");
  const block = Buffer.from(line.repeat(500), "latin1");
  let left = Math.max(size - header.length, 2);
  for (; left >= block.length + 2; left -= block.length) yield block;
  const rest = Buffer.alloc(left, line, "latin1");
  rest.write("\r\n", left - 2, "latin1");
  yield rest;
}

async function run(port, size, next, done) {
  const transport = nodemailer.createTransport({
    pool: true,
    host: job.host,
    port,
    name: "client.example",
    secure: job.tls === "implicit",
    requireTLS: job.tls === "starttls",
    ignoreTLS: job.tls === "none",
    maxConnections: job.conns,
    maxMessages: job.rotate,
    auth: { user: job.username, pass: job.password },
  });
  const { Readable } = await import("node:stream");
  async function one() {
    const message = job.stream ? null : newMessage(size);
    for (let n = next(); n > 0; n = next()) {
      if (message) message.write(String(n).padStart(16, "0"), numberAt, "latin1");
      const raw = message ?? Readable.from(stream(size, n), { objectMode: false });
      try {
        await transport.sendMail({ envelope: { from: sender, to: [recipient] }, raw });
        done();
      } catch (err) {
        done(err);
      }
    }
  }
  await Promise.all(Array.from({ length: job.senders }, one));
  transport.close();
}

function status(name) {
  try {
    const m = readFileSync("/proc/self/status", "utf8").match(new RegExp(`^${name}:\\s+(\\d+) kB`, "m"));
    return m ? Number(m[1]) * 1024 : 0;
  } catch {
    return 0;
  }
}

function counted(last) {
  let taken = 0;
  return () => (++taken > last ? 0 : taken);
}

if (job.waiters) {
  // Messages that wait for a relay that answers no final dot: the memory of each, after garbage collection.
  const transport = nodemailer.createTransport({
    pool: true, host: job.host, port: job.port, name: "client.example", ignoreTLS: true,
    maxConnections: job.conns, maxMessages: job.rotate, auth: { user: job.username, pass: job.password },
  });
  const message = newMessage(job.size);
  const send = () => transport.sendMail({ envelope: { from: sender, to: [recipient] }, raw: message }).catch(() => {});
  for (let i = 0; i < job.conns; i++) send();
  await new Promise((resolve) => setTimeout(resolve, 500));
  const held = () => { global.gc(); global.gc(); const m = process.memoryUsage(); return m.heapUsed + m.external; };
  const before = held();
  for (let i = 0; i < job.waiters; i++) send();
  await new Promise((resolve) => setTimeout(resolve, 1500));
  console.log(JSON.stringify({ waiter: Math.round((held() - before) / job.waiters) }));
  process.exit(0);
}

if (job.warm_port > 0) {
  await run(job.warm_port, Math.min(job.size, 10 << 10), counted(job.warm_messages), (err) => {
    if (err) throw err;
  });
}
global.gc?.();
try {
  writeFileSync("/proc/self/clear_refs", "5");
} catch {
  // not Linux: the peak is that of the whole process
}
const idle = status("VmRSS");
const result = { sent: 0, failed: 0, errors: [], wall_ns: 0, mallocs: -1, octets: -1, idle_rss: idle };
const cpu = process.cpuUsage();
const start = process.hrtime.bigint();
let next = counted(job.messages);
if (job.messages === 0) {
  const until = start + BigInt(job.millis) * 1000000n;
  let taken = 0;
  next = () => (process.hrtime.bigint() < until ? ++taken : 0);
}
await run(job.port, job.size, next, (err) => {
  result.wall_ns = Number(process.hrtime.bigint() - start);
  if (!err) result.sent++;
  else {
    result.failed++;
    if (result.errors.length < 3) result.errors.push(err.message);
  }
});
const used = process.cpuUsage(cpu);
result.cpu_ns = (used.user + used.system) * 1000;
result.peak_rss = status("VmHWM");
console.log(JSON.stringify(result));
process.exit(0);
