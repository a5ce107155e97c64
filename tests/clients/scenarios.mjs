// What the official JavaScript client sees: node scenarios.mjs URL NAME ends with 0 if all was as it should be.

import { check, client, once, refused, sleep, subscribed, until, WebSocket } from './kit.mjs';

const [url, name] = process.argv.slice(2);
const position = { recoverable: true, positioned: true };
const raw = () =>
  new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.texts = [];
    socket.on('message', (data, isBinary) => {
      check(!isBinary, 'a text frame');
      socket.texts.push(data.toString());
    });
    socket.on('open', () => resolve(socket));
    socket.on('error', reject);
  });
const closed = (socket) => new Promise((resolve) => socket.on('close', (code, reason) => resolve([code, `${reason}`])));

const scenarios = {
  async connect() {
    const a = client(url, { name: 'alice' });
    const connected = once(a, 'connected');
    const [, log] = await subscribed(a, 'chat', position);
    const context = await connected;
    check(context.data.hi === 1 && context.client.length > 8, 'what on_connect said');
    check(log.subscribed[0].recoverable && log.subscribed[0].positioned, 'recoverable');
    check(!log.subscribed[0].wasRecovering, 'not recovering');
    await a.publish('chat', { a: 1 });
    await until(() => log.publications.length === 1, 'own publication');
    const [publication] = log.publications;
    check(publication.offset > 0 && publication.info.user === 'alice', 'offset and info');
    check(publication.info.connInfo.n === 1, 'conn_info');
    const [, unpositioned] = await subscribed(client(url), 'chat');
    await a.publish('chat', 'x');
    await until(() => unpositioned.publications.length === 1, 'unpositioned');
    check(unpositioned.publications[0].offset === publication.offset + 1, 'an offset for everybody');
    const [, plain] = await subscribed(client(url), 'no/history', position);
    check(!plain.subscribed[0].recoverable, 'not recoverable without history');
    await a.publish('no/history', null);
    await until(() => plain.publications.length === 1, 'null as data');
    check(plain.publications[0].data === null && plain.publications[0].offset === undefined, 'no offset');
    const [, pattern] = await subscribed(client(url), '#', position);
    check(!pattern.subscribed[0].recoverable, 'a pattern beyond what has history is not recoverable');
    await a.publish('upper', 'abc');
    await until(() => pattern.publications.length === 1, 'changed by the hook');
    check(pattern.publications[0].data === 'ABC', 'upper case');
  },

  async crossing() {
    // Subscribers on all workers, found by the process id that each connection tells.
    const clients = new Map();
    for (let attempt = 0; clients.size < 4 && attempt < 200; attempt++) {
      const one = client(url);
      one.connect();
      const { data } = await one.rpc('pid', {});
      if (clients.has(data)) one.disconnect();
      else clients.set(data, one);
    }
    check(clients.size === 4, 'a client on each of the four workers');
    const logs = [];
    for (const one of clients.values()) logs.push((await subscribed(one, 'h/cross', position))[1]);
    const [first, ...others] = clients.values();
    for (const one of clients.values()) await one.publish('h/cross', 1);
    for (const log of logs) {
      await until(() => log.publications.length === 4, 'all four');
      const offsets = log.publications.map((publication) => publication.offset);
      check(offsets.join() === [...offsets].sort((x, y) => x - y).join(), 'in order');
    }
    check(others.length === 3 && first, 'all there');
  },

  async wildcard() {
    const [a, b] = [client(url), client(url)];
    const [, exact] = await subscribed(a, 'h/7/msg', position);
    const [, log] = await subscribed(a, 'h/+/msg', position);
    await b.connect();
    await b.publish('h/7/msg', 'x');
    await until(() => log.publications.length === 1 && exact.publications.length === 1, 'one push each');
    check(log.publications[0].tags.topic === 'h/7/msg', 'tags.topic');
    check(log.publications[0].channel === 'h/+/msg' && exact.publications[0].tags === undefined, 'channels');
    a.disconnect();
    for (const topic of ['h/1/msg', 'h/2/msg', 'h/1/no']) await b.publish(topic, topic);
    a.connect();
    await until(() => log.subscribed.length === 2, 'subscribed again');
    check(log.subscribed[1].recovered && log.subscribed[1].wasRecovering, 'recovered');
    await until(() => log.publications.length === 3, 'exactly what matches');
    check(log.publications[2].tags.topic === 'h/2/msg', 'tags of what was recovered');
    const bad = a.newSubscription('a/#/b');
    bad.subscribe();
    check((await once(bad, 'unsubscribed')).code === 107, 'an invalid pattern');
    await refused(b.publish('a/+', 1), 107);
  },

  async presence() {
    const [a, b] = [client(url, { name: 'alice' }), client(url, { name: 'bob' })];
    const [first, log] = await subscribed(a, 'chat', { joinLeave: true });
    await until(() => log.joins.includes('alice'), 'one is told of oneself');
    const [second] = await subscribed(b, 'chat');
    await until(() => log.joins.includes('bob'), 'join');
    const { clients } = await first.presence();
    check(Object.values(clients).map((info) => info.user).sort().join() === 'alice,bob', 'presence');
    const { numClients, numUsers } = await first.presenceStats();
    check(numClients === 2 && numUsers === 2, 'presence_stats');
    const third = client(url, { name: 'carol' });
    await subscribed(third, 'chat/#');
    check((await first.presenceStats()).numClients === 2, 'a wildcard counts under its own filter');
    const listed = (await a.rpc('presence', { channel: 'chat' })).data;
    check(Object.keys(listed).length === 2, 'manager.presence');
    second.unsubscribe();
    await until(() => log.leaves.includes('bob'), 'leave');
    check((await first.presenceStats()).numClients === 1, 'one is left');
    await refused(a.presence('no/presence'), 108);
    await refused(a.presenceStats('no/presence'), 108);
  },

  async history() {
    const a = client(url);
    a.connect();
    for (let number = 0; number < 5; number++) await a.publish('h/hist', { number });
    const all = await a.history('h/hist', { limit: 10 });
    check(all.publications.map((item) => item.data.number).join() === '0,1,2,3,4', 'all');
    const top = await a.history('h/hist', { limit: 0 });
    check(top.publications.length === 0 && top.offset === all.offset && top.epoch, 'the top alone');
    const newest = await a.history('h/hist', { limit: 2, reverse: true });
    check(newest.publications.map((item) => item.data.number).join() === '4,3', 'newest first');
    const since = { offset: all.publications[1].offset, epoch: all.epoch };
    const later = await a.history('h/hist', { limit: 10, since });
    check(later.publications.map((item) => item.data.number).join() === '2,3,4', 'since');
    await refused(a.history('h/hist', { limit: 1, since: { offset: 1, epoch: 'zz' } }), 112);
    await refused(a.history('no/history', { limit: 1 }), 108);
    check((await a.rpc('history', { channel: 'h/hist' })).data.length === 5, 'manager.history');
  },

  async rpc() {
    const a = client(url, { name: 'dora' });
    a.connect();
    check((await a.rpc('echo', { x: [1, null] })).data.x[0] === 1, 'rpc');
    await refused(a.rpc('none', {}), 104);
    const answer = once(a, 'message');
    await a.send({ q: 1 });
    check((await answer).data.echo.q === 1, 'send and message');
    const secret = a.newSubscription('secret');
    secret.subscribe();
    const { code, reason } = await once(secret, 'unsubscribed');
    check(code === 103 && reason, 'refused by the hook');
    await refused(a.publish('closed/x', 1), 103);
    const wrong = a.newSubscription('wrong');
    wrong.subscribe();
    check((await once(wrong, 'error')).error.code === 100, 'a hook that fails is error 100');
    wrong.unsubscribe();
    const [, said] = await subscribed(a, 'no/data', { data: { mine: 1 } });
    check(said.subscribed[0].data.you.mine === 1, 'data both ways');
  },

  async unsubscribe() {
    const [a, b] = [client(url), client(url)];
    b.connect();
    const [subscription, log] = await subscribed(a, 'h/un', position);
    await a.publish('h/un', 0);
    const again = once(subscription, 'subscribed');
    a.rpc('unsub', { channel: 'h/un', code: 2500 });
    for (let number = 1; number < 4; number++) await b.publish('h/un', number);
    check((await again).recovered, '2500: comes back and recovers');
    await until(() => log.publications.length === 4, 'nothing missed, nothing twice');
    const ended = once(subscription, 'unsubscribed');
    await a.rpc('unsub', { channel: 'h/un', code: 2000 });
    check((await ended).code === 2000, '2000: for good');
    for (let round = 0; round < 20; round++) {
      subscription.subscribe();
      subscription.unsubscribe();
    }
    subscription.subscribe();
    await subscription.ready(8000);
    check(a.state === 'connected', 'quick unsubscribe and subscribe');
  },

  async storm() {
    const [a, b] = [client(url), client(url)];
    b.connect();
    const [subscription, log] = await subscribed(a, 'h/storm', position);
    let [stop, sent] = [false, 0];
    const pump = (async () => {
      while (!stop) {
        await b.rpc('pub', { channel: 'h/storm', n: 3 });
        sent += 3;
        await sleep(5);
      }
    })();
    for (let round = 0; round < 8; round++) {
      const back = once(subscription, 'subscribed');
      const ways = [['drop', {}], ['disconnect', { code: 3000 }], ['unsub', { channel: 'h/storm', code: 2500 }]];
      a.rpc(...ways[round % 3]).catch(() => {});
      check((await back).recovered, `recovered in round ${round}`);
      await sleep(50);
    }
    stop = true;
    await pump;
    await until(() => log.publications.length === sent, `each of ${sent} once`);
    check(log.publications.every((item, place, all) => !place || item.offset > all[place - 1].offset), 'rising');
  },

  async overrun() {
    const [a, b] = [client(url), client(url)];
    b.connect();
    const [, log] = await subscribed(a, 'h/over', position);
    await b.publish('h/over', 0);
    await until(() => log.publications.length === 1, 'live');
    a.disconnect();
    await b.rpc('pub', { channel: 'h/over', n: 250 });
    a.connect();
    await until(() => log.subscribed.length === 2, 'subscribed again');
    check(log.subscribed[1].wasRecovering && !log.subscribed[1].recovered, 'not recovered');
    await b.publish('h/over', 'live');
    await until(() => log.publications.length === 2, 'goes on live');
    check(log.publications[1].data === 'live', 'and nothing of the lost ones');
  },

  async serverside() {
    const a = client(url, { token: 'subs' });
    const b = client(url);
    const [subs, publications] = [[], []];
    a.on('subscribed', (context) => subs.push(context));
    a.on('publication', (context) => publications.push(context));
    a.connect();
    b.connect();
    await until(() => subs.length === 1 && subs[0].channel === 'h/server' && subs[0].recoverable, 'subscribed');
    await b.publish('h/server', 1);
    await until(() => publications.length === 1, 'published');
    a.rpc('disconnect', { code: 3000 }).catch(() => {});
    await once(a, 'connecting');
    await b.publish('h/server', 2);
    await until(() => subs.length === 2 && subs[1].recovered && publications.length === 2, 'recovered');
    await a.rpc('subscribe', { channel: 'dyn' });
    await until(() => subs.length === 3 && subs[2].channel === 'dyn', 'subscribe push');
    const ended = once(a, 'unsubscribed');
    await a.rpc('unsub', { channel: 'dyn', code: 2000 });
    check((await ended).channel === 'dyn', 'unsubscribe push');
    a.rpc('disconnect', { code: 3500, reason: 'go' }).catch(() => {});
    check((await once(a, 'disconnected')).code === 3500, 'a terminal close');
    const bad = client(url, { token: 'bad' });
    bad.connect();
    check((await once(bad, 'disconnected')).code === 3500, 'refused by on_connect');
  },

  async limits() {
    const a = client(url);
    const subscriptions = Array.from({ length: 129 }, (_, number) => a.newSubscription(`m/${number}`));
    for (const subscription of subscriptions) subscription.subscribe();
    a.connect();
    const count = (state) => subscriptions.filter((subscription) => subscription.state === state).length;
    await until(() => count('subscribed') === 128 && count('unsubscribed') === 1, '128 of 129');
    const binary = await raw();
    binary.send(Buffer.from('{"id":1,"connect":{}}'));
    check((await closed(binary))[0] === 3501, 'binary: 3501');
    const large = await raw();
    large.send(`{"id":1,"connect":{"data":"${'x'.repeat(70000)}"}}`);
    check((await closed(large))[0] === 3501, 'too large: 3501');
    const huge = client(url);
    huge.connect();
    await once(huge, 'connected');
    huge.publish('no/history', 'x'.repeat(70000)).catch(() => {});
    check((await once(huge, 'disconnected')).code === 3501, 'the client is told so, too');
    const garbage = await raw();
    garbage.send('{"id":1,"nonsense":{}}');
    check((await closed(garbage))[0] === 3501, 'garbage: 3501');
    const texts = await raw();
    texts.send('{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"no/x"}}\n{"id":3,"rpc":{"method":"nope"}}');
    texts.send('{"id":4,"presence":{"channel":"no/x"}}\n{"id":6,"publish":{"channel":"no/x","data":{"a" : "\\n"}}}');
    const said = () => texts.texts.flatMap((text) => text.split('\n'));
    await until(() => said().length >= 6, 'five replies and a push');
    texts.send('{"id":5,"publish":{"channel":"no/x","data":{"a":\n1}}}');
    check((await closed(texts))[0] === 3501, 'half a command: 3501');
    const lines = said();
    check(lines.every((line) => line.trim()), 'no blank line');
    for (const line of lines) {
      const { error } = JSON.parse(line);
      check(!error || (error.code && error.message), 'errors have a code and a message');
    }
  },

  async silence() {
    // A client that never answers a ping: the hub's interval is one second in this test.
    const mute = await raw();
    mute.send('{"id":1,"connect":{}}');
    const [code, reason] = await closed(mute);
    check(code === 3012 && reason === 'no pong', `no pong: ${code}`);
    check(mute.texts.some((text) => text.split('\n').includes('{}')), 'it was pinged');
  },

  async restart() {
    // The hub is restarted while one client is away and another one stays: what its new store can recover, it says.
    const kept = process.argv[4] === 'kept';
    const [away, stays] = [client(url), client(url)];
    const logs = [];
    for (const one of [away, stays]) logs.push((await subscribed(one, 'h/restart', position))[1]);
    for (const number of [1, 2]) await stays.publish('h/restart', number);
    for (const log of logs) await until(() => log.publications.length === 2, 'both');
    away.disconnect();
    await stays.publish('h/restart', 3);
    await until(() => logs[1].publications.length === 3, 'the third, for who is there');
    const connecting = once(stays, 'connecting', 30000);
    console.log('ready');
    await connecting;
    await new Promise((resolve) => process.stdin.once('data', resolve));
    away.connect();
    for (const log of logs) {
      await until(() => log.subscribed.length === 2, 'subscribed again', 30000);
      const [before, after] = log.subscribed;
      check(after.wasRecovering && after.recoverable, 'it asked for recovery');
      check(after.recovered === kept, `recovered: ${after.recovered}`);
      check((after.streamPosition.epoch === before.streamPosition.epoch) === kept, 'another store, another epoch');
    }
    if (kept) await until(() => logs[0].publications.length === 3, 'what was missed');
    await stays.publish('h/restart', 'on');
    for (const log of logs) await until(() => log.publications.at(-1).data === 'on', 'the client goes on');
    const seen = logs.map((log) => log.publications.map(({ data, offset }) => `${offset}:${data}`).join(' '));
    const on = kept ? '4:on' : '1:on';
    check(seen[0] === (kept ? `1:1 2:2 3:3 ${on}` : `1:1 2:2 ${on}`), `who was away has ${seen[0]}`);
    check(seen[1] === `1:1 2:2 3:3 ${on}`, `who was there has ${seen[1]}`);
  },

  async drain() {
    // Stays connected while the hub reloads; the test reads what it says.
    const clients = Array.from({ length: 30 }, () => client(url, { minReconnectDelay: 100, maxReconnectDelay: 500 }));
    const closes = [];
    for (const one of clients) {
      one.on('connecting', (context) => context.code >= 3000 && closes.push([context.code, context.reason]));
      one.connect();
      await once(one, 'connected');
    }
    console.log('ready');
    await until(() => closes.length >= 30, 'all were sent away', 30000);
    check(closes.every(([code, reason]) => code === 3001 && reason === 'shutdown'), JSON.stringify(closes));
    await until(() => clients.every((one) => one.state === 'connected'), 'all are back', 30000);
  },
};

try {
  await scenarios[name]();
  process.exit(0);
} catch (error) {
  console.error(`${name}:`, error);
  process.exit(1);
}
