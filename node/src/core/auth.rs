//! Tokens: verifying connection and subscription JWTs.
//!
//! Owns the keys and the claims. Signatures are `jsonwebtoken`'s work; times are compared here against
//! the `now` given, to the second: a token whose `exp` equals now is expired, one whose `nbf` lies
//! ahead is answered like an expired one. What a claim does to a connection is decided by the callers.
//! An `info` above [`ringmain_proto::limits::INFO_BYTES_MAX`] makes its token invalid.
//! The claims `meta` and `caps` are accepted and mean nothing here.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use ringmain_proto::time::Now;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::config::{CoreConfig, TokenConfig};
use super::infos::is_short;

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    /// It was good, or will be: the client may fetch another.
    #[error("token expired")]
    Expired,
    /// Malformed, signed by somebody else, or for somebody else.
    #[error("token invalid")]
    Invalid,
}

/// A key of the configuration that cannot be used. The operator's fault.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {source}")]
pub struct KeyError {
    /// Path of the configuration key.
    pub key: String,
    /// What is wrong with it.
    pub source: jsonwebtoken::errors::Error,
}

/// Claims of a connection token.
#[derive(Debug, Default)]
pub(crate) struct ConnectionClaims {
    pub(crate) sub: String,
    /// When the connection expires, in seconds since the epoch: `expire_at`, or else the token's `exp`.
    pub(crate) expire_at: Option<u64>,
    pub(crate) info: Option<Box<[u8]>>,
    /// Channels to subscribe to on connect: the `subs` claim, or else `channels`.
    pub(crate) subs: Vec<(String, SubOptions)>,
}

/// Claims of a subscription token.
#[derive(Debug)]
pub(crate) struct SubscriptionClaims {
    pub(crate) sub: String,
    /// The client that it was made for; empty: any of the user's.
    pub(crate) client: String,
    pub(crate) channel: String,
    /// When the subscription expires, in seconds since the epoch: `expire_at`, or else the token's `exp`.
    pub(crate) expire_at: Option<u64>,
    pub(crate) options: SubOptions,
}

/// What a token says about one subscription.
#[derive(Debug, Default)]
pub(crate) struct SubOptions {
    /// Shown as `chan_info`.
    pub(crate) info: Option<Box<[u8]>>,
    /// Told with the subscription.
    pub(crate) data: Option<Box<[u8]>>,
    pub(crate) overrides: Overrides,
}

/// Options of the namespace that a token may override.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Overrides {
    pub(crate) presence: Option<BoolValue>,
    pub(crate) join_leave: Option<BoolValue>,
    pub(crate) force_push_join_leave: Option<BoolValue>,
    pub(crate) force_recovery: Option<BoolValue>,
    pub(crate) force_positioning: Option<BoolValue>,
}

/// A boolean that is distinguished from an absent one, as Centrifugo writes it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct BoolValue {
    pub(crate) value: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawClaims {
    #[serde(deserialize_with = "or_default")]
    sub: String,
    #[serde(deserialize_with = "or_default")]
    client: String,
    #[serde(deserialize_with = "or_default")]
    channel: String,
    exp: Option<serde_json::Number>,
    nbf: Option<serde_json::Number>,
    expire_at: Option<serde_json::Number>,
    #[serde(deserialize_with = "or_default")]
    channels: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    subs: BTreeMap<String, Option<RawOptions>>,
    // Of the connection in a connection token, of the subscription in a subscription token.
    info: Option<Box<RawValue>>,
    #[serde(deserialize_with = "or_default")]
    b64info: String,
    data: Option<Box<RawValue>>,
    #[serde(deserialize_with = "or_default")]
    b64data: String,
    #[serde(rename = "override")]
    overrides: Option<Overrides>,
}

/// An entry of the `subs` claim.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawOptions {
    info: Option<Box<RawValue>>,
    #[serde(deserialize_with = "or_default")]
    b64info: String,
    data: Option<Box<RawValue>>,
    #[serde(deserialize_with = "or_default")]
    b64data: String,
    #[serde(rename = "override")]
    overrides: Option<Overrides>,
}

/// `null` is the same as absence.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl RawClaims {
    /// When what the token grants expires, if the token itself may be used now.
    fn in_time(&self, now: Now) -> Result<Option<u64>, TokenError> {
        let exp = self.exp.as_ref().map(seconds).transpose()?;
        let nbf = self.nbf.as_ref().map(seconds).transpose()?;
        if exp.is_some_and(|exp| exp <= now.unix_s()) || nbf.is_some_and(|nbf| nbf > now.unix_s()) {
            return Err(TokenError::Expired);
        }
        // `expire_at` sets that apart from the token's own life; 0: it does not expire.
        Ok(match self.expire_at.as_ref().map(seconds).transpose()? {
            Some(0) => None,
            Some(at) => Some(at),
            None => exp,
        })
    }
}

impl RawOptions {
    fn checked(self) -> Result<SubOptions, TokenError> {
        Ok(SubOptions {
            info: info_value(self.info, &self.b64info)?,
            data: json_value(self.data, &self.b64data)?,
            overrides: self.overrides.unwrap_or_default(),
        })
    }
}

/// A value given as JSON or, which then counts, in base64. Bytes that are no JSON are dropped: no client
/// protocol of this node can carry them.
fn json_value(json: Option<Box<RawValue>>, base64: &str) -> Result<Option<Box<[u8]>>, TokenError> {
    if base64.is_empty() {
        let given = json.filter(|json| json.get() != "null");
        return Ok(given.map(|json| Box::from(json.get().as_bytes())));
    }
    let bytes = STANDARD.decode(base64).map_err(|_| TokenError::Invalid)?;
    let text = std::str::from_utf8(&bytes).ok().filter(|text| ringmain_proto::json::is_valid(text));
    Ok(text.map(|text| Box::from(text.as_bytes())))
}

/// The same, of what a user shows of itself.
fn info_value(json: Option<Box<RawValue>>, base64: &str) -> Result<Option<Box<[u8]>>, TokenError> {
    let info = json_value(json, base64)?;
    if is_short(info.as_deref()) { Ok(info) } else { Err(TokenError::Invalid) }
}

/// A NumericDate (RFC 7519 section 2) in whole seconds.
fn seconds(number: &serde_json::Number) -> Result<u64, TokenError> {
    match (number.as_u64(), number.as_f64()) {
        (Some(seconds), _) => Ok(seconds),
        (None, Some(seconds)) if seconds >= 0.0 => Ok(seconds as u64),
        (None, Some(_)) => Ok(0),
        _ => Err(TokenError::Invalid),
    }
}

/// The keys of one kind of tokens.
#[derive(Default)]
struct Keys {
    families: Vec<Family>,
}

/// A key, and the algorithms that use it.
struct Family {
    key: DecodingKey,
    validation: Validation,
}

/// Verifies both kinds of tokens.
#[derive(Default)]
pub(crate) struct Verifier {
    connection: Keys,
    subscription: Option<Keys>,
}

impl Keys {
    fn new(config: &TokenConfig, section: &str) -> Result<Self, KeyError> {
        use Algorithm::*;
        let named = |key: &str, result: Result<DecodingKey, jsonwebtoken::errors::Error>| {
            result.map_err(|source| KeyError { key: format!("{section}.{key}"), source })
        };
        let mut families = Vec::new();
        let mut add = |key, algorithms: &[Algorithm]| {
            families.push(Family { key, validation: validation(config, algorithms) });
        };
        if let Some(secret) = config.hmac_secret.as_ref().filter(|secret| !secret.0.is_empty()) {
            add(DecodingKey::from_secret(secret.0.as_bytes()), &[HS256, HS384, HS512]);
        }
        if let Some(pem) = &config.rsa_public_key {
            let key = named("rsa_public_key", DecodingKey::from_rsa_pem(pem.as_bytes()))?;
            add(key, &[RS256, RS384, RS512, PS256, PS384, PS512]);
        }
        if let Some(pem) = &config.ecdsa_public_key {
            let key = named("ecdsa_public_key", DecodingKey::from_ec_pem(pem.as_bytes()))?;
            add(key, &[ES256, ES384]);
        }
        if let Some(pem) = &config.eddsa_public_key {
            let key = named("eddsa_public_key", DecodingKey::from_ed_pem(pem.as_bytes()))?;
            add(key, &[EdDSA]);
        }
        Ok(Self { families })
    }

    fn verify(&self, token: &str) -> Result<RawClaims, TokenError> {
        let family = match &*self.families {
            [] => return Err(TokenError::Invalid),
            // The only one: its validation refuses what others have signed.
            [family] => family,
            families => {
                let header = decode_header(token).map_err(|_| TokenError::Invalid)?;
                let signs = |family: &&Family| family.validation.algorithms.contains(&header.alg);
                families.iter().find(signs).ok_or(TokenError::Invalid)?
            }
        };
        let data = decode::<RawClaims>(token.as_bytes(), &family.key, &family.validation);
        data.map(|data| data.claims).map_err(|_| TokenError::Invalid)
    }
}

/// What a token signed by one of these algorithms must say, besides its times: those are compared against the
/// core's clock, not the system's.
fn validation(config: &TokenConfig, algorithms: &[Algorithm]) -> Validation {
    let mut validation = Validation::new(algorithms[0]);
    validation.algorithms = algorithms.to_vec();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.required_spec_claims.clear();
    validation.validate_aud = config.audience.is_some();
    if let Some(audience) = &config.audience {
        validation.set_audience(&[audience]);
        validation.required_spec_claims.insert("aud".to_owned());
    }
    if let Some(issuer) = &config.issuer {
        validation.set_issuer(&[issuer]);
        validation.required_spec_claims.insert("iss".to_owned());
    }
    validation
}

impl Verifier {
    pub(crate) fn new(config: &CoreConfig) -> Result<Self, KeyError> {
        let connection = Keys::new(&config.token, "token")?;
        let subscription = config
            .subscription_token
            .as_ref()
            .map(|config| Keys::new(config, "subscription_token"))
            .transpose()?;
        Ok(Self { connection, subscription })
    }

    /// Claims of a connection token. One that names a `channel` is a subscription token, and no good.
    pub(crate) fn connection(&self, token: &str, now: Now) -> Result<ConnectionClaims, TokenError> {
        let claims = self.connection.verify(token)?;
        if !claims.channel.is_empty() {
            return Err(TokenError::Invalid);
        }
        let expire_at = claims.in_time(now)?;
        let subs: Result<Vec<_>, TokenError> = if claims.subs.is_empty() {
            claims.channels.into_iter().map(|name| Ok((name, SubOptions::default()))).collect()
        } else {
            let checked = |options: Option<RawOptions>| -> Result<SubOptions, TokenError> {
                options.unwrap_or_default().checked()
            };
            claims.subs.into_iter().map(|(name, options)| Ok((name, checked(options)?))).collect()
        };
        let info = info_value(claims.info, &claims.b64info)?;
        Ok(ConnectionClaims { sub: claims.sub, expire_at, info, subs: subs? })
    }

    /// Claims of a subscription token, which must name a `channel`.
    pub(crate) fn subscription(&self, token: &str, now: Now) -> Result<SubscriptionClaims, TokenError> {
        let claims = self.subscription.as_ref().unwrap_or(&self.connection).verify(token)?;
        let expire_at = claims.in_time(now)?;
        if claims.channel.is_empty() {
            return Err(TokenError::Invalid);
        }
        let RawClaims { sub, client, channel, info, b64info, data, b64data, overrides, .. } = claims;
        let options = RawOptions { info, b64info, data, b64data, overrides }.checked()?;
        Ok(SubscriptionClaims { sub, client, channel, expire_at, options })
    }
}
