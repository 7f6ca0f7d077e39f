// Clients of the SDK that are patient: several nodes, brokers and whatever else runs share this machine.

import { Client } from '../../e2e/lib/sdk.js';
import { until } from '../../e2e/lib/node.js';

const PATIENCE_MS = 30_000;

class PatientClient extends Client {
  async connect() {
    this.sdk.connect();
    this.connected = await this.event('connected', { ms: PATIENCE_MS });
    return this;
  }

  async subscribe(channel, options = {}) {
    const sub = this.subscription(channel, options);
    sub.sdk.subscribe();
    await sub.event('subscribed', { ms: PATIENCE_MS });
    return sub;
  }
}

/** A connected client. */
export const connect = (node, options) => new PatientClient(node, options).connect();

/** Publishes; a node that says that it cannot just now (100, temporary) has not published, and is asked again. */
export function publish(client, channel, data) {
  let last;
  const accepted = async () => {
    try {
      await client.sdk.publish(channel, data);
      return true;
    } catch (error) {
      last = error;
      if (error.code !== 100 || !error.temporary) {
        throw new Error(`publish to ${channel}: ${JSON.stringify(error)}`);
      }
      return false;
    }
  };
  return until(accepted, PATIENCE_MS, () => `publish to ${channel}: ${JSON.stringify(last)}`);
}
