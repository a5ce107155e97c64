// What the scenarios share: clients of the official package, and waiting with a deadline.

import { Centrifuge } from 'centrifuge';
import WebSocket from 'ws';

export { WebSocket };

export const client = (url, options = {}) =>
  new Centrifuge(url, {
    websocket: WebSocket,
    minReconnectDelay: 50,
    maxReconnectDelay: 300,
    minResubscribeDelay: 50,
    ...options,
  });

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export const check = (condition, what) => {
  if (!condition) throw new Error(`not so: ${what}`);
};

export const once = (emitter, name, ms = 8000) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${name} within ${ms} ms`)), ms);
    emitter.once(name, (context) => {
      clearTimeout(timer);
      resolve(context);
    });
  });

export const until = async (condition, what, ms = 8000) => {
  const end = Date.now() + ms;
  while (!condition()) {
    if (Date.now() > end) throw new Error(`did not come true within ${ms} ms: ${what}`);
    await sleep(10);
  }
};

export const refused = async (promise, code) => {
  let error = null;
  try {
    await promise;
  } catch (caught) {
    error = caught;
  }
  check(error && error.code === code, `error ${code}, got ${JSON.stringify(error)}`);
  check(typeof error.message === 'string' && error.message, `a message with error ${code}`);
};

export const subscribed = async (centrifuge, channel, options = {}) => {
  const subscription = centrifuge.newSubscription(channel, options);
  const log = { publications: [], joins: [], leaves: [], subscribed: [] };
  subscription.on('publication', (context) => log.publications.push(context));
  subscription.on('join', (context) => log.joins.push(context.info.user));
  subscription.on('leave', (context) => log.leaves.push(context.info.user));
  subscription.on('subscribed', (context) => log.subscribed.push(context));
  subscription.subscribe();
  centrifuge.connect();
  await subscription.ready(8000);
  return [subscription, log];
};
