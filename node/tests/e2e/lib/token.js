// JSON Web Tokens for the tests, made with node's own crypto.

import { createHmac, sign } from 'node:crypto';

import { SECRET } from './node.js';

const encode = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');

export const nowS = () => Math.floor(Date.now() / 1000);

/** An HS256 token of these claims. */
export function token(claims, secret = SECRET) {
  const body = `${encode({ alg: 'HS256', typ: 'JWT' })}.${encode(claims)}`;
  return `${body}.${createHmac('sha256', secret).update(body).digest('base64url')}`;
}

/** A token signed with a private key: RS256, ES256 or EdDSA. */
export function signedToken(alg, key, claims) {
  const body = `${encode({ alg, typ: 'JWT' })}.${encode(claims)}`;
  const hash = alg === 'EdDSA' ? null : 'sha256';
  const signature = sign(hash, Buffer.from(body), { key, dsaEncoding: 'ieee-p1363' });
  return `${body}.${signature.toString('base64url')}`;
}
