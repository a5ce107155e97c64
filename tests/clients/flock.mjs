// Many clients of the official package that count what they get, for the acceptance test:
// node flock.mjs '{"url", "subscribers", "publishers", "rate", "topic", "pattern"}'
// says "ready", publishes until a line comes in, waits until all is quiet, and prints what everybody got as JSON.

import { client, once, sleep } from './kit.mjs';

const { url, subscribers, publishers, rate, topic, pattern } = JSON.parse(process.argv[2]);
const options = { minReconnectDelay: 100, maxReconnectDelay: 1000, minResubscribeDelay: 50, timeout: 5000 };
const got = [];
const unrecovered = [];
let [recoveries, errors, last] = [0, 0, Date.now()];

const subscribe = async (number) => {
  const one = client(url, options);
  const mine = [];
  got.push(mine);
  const subscription = one.newSubscription(number % 2 ? pattern : topic, { recoverable: true, positioned: true });
  subscription.on('publication', ({ data, offset }) => {
    mine.push([offset, data.id]);
    last = Date.now();
  });
  subscription.on('subscribed', ({ wasRecovering, recovered }) => {
    if (wasRecovering) recoveries++;
    if (wasRecovering && !recovered) unrecovered.push(number);
  });
  subscription.on('error', () => errors++);
  subscription.subscribe();
  one.connect();
  await subscription.ready(20000);
  return one;
};

const acknowledged = [];
const sent = [];
let stop = false;
const publish = async (number) => {
  const one = client(url, options);
  one.connect();
  await once(one, 'connected', 20000);
  const pending = [];
  const started = Date.now();
  for (let count = 0; !stop; count++) {
    const due = started + (count * 1000) / rate;
    if (due > Date.now()) await sleep(due - Date.now());
    if (one.state !== 'connected') continue;
    const id = `${number}.${count}`;
    sent.push(id);
    pending.push(one.publish(topic, { id }).then(() => acknowledged.push(id), () => {}));
  }
  await Promise.all(pending);
};

await Promise.all(Array.from({ length: subscribers }, (_, number) => subscribe(number)));
console.log('ready');
process.stdin.once('data', () => (stop = true));
await Promise.all(Array.from({ length: publishers }, (_, number) => publish(number)));
last = Date.now();
const target = new Set(acknowledged).size;
const complete = () => got.every((mine) => mine.length >= target);
for (const end = Date.now() + 20000; Date.now() < end && !(complete() && Date.now() - last > 1500); ) await sleep(50);
const report = JSON.stringify({ got, acknowledged, sent, unrecovered, recoveries, errors });
process.stdout.write(`${report}\n`, () => process.exit(0));
