-- The one script of the bus: publishes, reads and clears channels, and sounds the canary.
--
-- Per channel one HASH, so that position, lineage, history and ids live and die together:
--   m        replid (40) epoch (8), 7 numbers of 8 bytes, big endian: top floor last_ms oldest_ms ids_floor expires_ms
--            gone; lineage (16 each)
--   o<offset> time_ms (8) envelope            history: the offsets (floor, top]; what is in (gone, floor] is not read
--   i<id>     offset (8) time_ms (8)          where an id stands
--   j<offset> time_ms (8) length (2) id ...   the ids from this offset on that were stored together; those of the offsets
--                                             (ids_floor, top] are kept
-- Offsets in names are 8 bytes: numbers as text are slow here, and this script is what limits the server.
--
-- KEYS: one per operation. ARGV: the publish command, then each operation's letter and arguments. Publications on one
-- channel that follow each other are one operation: one look at the channel, one write, one message to subscribers.
-- Answers one value per operation; what fails alone fails as {'X', message, publications in it}.
-- A later release adds fields; it does not change what these mean.
-- Epochs and replication ids are never numbers here: a number has 53 bits.

local CHUNK = 500          -- fields of one command: Lua's stack is bounded
local LINEAGE_BYTES = 128  -- the last 8
local GONE_MAX = 64        -- entries below the floor are removed together
local IDS_EVERY = 64       -- publications between two looks at old ids
local IDS_BATCH = 256      -- ids let go in one look, about
local PAGE_BYTES = 4194304 -- a page is cut here

local call, pack, unpack_from, sub = redis.call, struct.pack, struct.unpack, string.sub
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local info = call('INFO', 'replication')
local replid = string.match(info, 'master_replid:(%x+)')
local publish_command = ARGV[1]
local at = 1

local function arg()
  at = at + 1
  return ARGV[at]
end

local function load(m)
  local top, floor, last, oldest, ids, expires, gone = unpack_from('>I8I8I8I8I8I8I8', m, 49)
  return {
    replid = sub(m, 1, 40), epoch = sub(m, 41, 48), lineage = sub(m, 105), top = top, floor = floor, last = last,
    oldest = oldest, ids = ids, expires = expires, gone = gone, word = false, dirty = false, renew = false, m = m,
  }
end

local function state(s)
  local numbers = pack('>I8I8I8I8I8I8I8', s.top, s.floor, s.last, s.oldest, s.ids, s.expires, s.gone)
  return replid .. s.epoch .. numbers .. s.lineage
end

-- Tells of the publications (previous, top]; of none: of the position.
local function tell(s, key, channel, flags, previous, envelopes)
  local parts = {
    pack('>BBI2', 1, flags, #key), key, s.epoch, pack('>I8I8B', previous, s.top, #s.lineage / 16), s.lineage,
  }
  for i = 1, #envelopes do
    parts[#parts + 1] = pack('>I4', #envelopes[i])
    parts[#parts + 1] = envelopes[i]
  end
  call(publish_command, channel, table.concat(parts))
end

local function entry_at(offset)
  return 'o' .. pack('>I8', offset)
end

local function drop(key, first, last)
  while first <= last do
    local fields = {}
    for offset = first, math.min(last, first + CHUNK - 1) do fields[#fields + 1] = entry_at(offset) end
    call('HDEL', key, unpack(fields))
    first = first + CHUNK
  end
end

local function time_of(key, offset)
  local entry = call('HGET', key, entry_at(offset))
  return entry and (unpack_from('>I8', entry)) or 0
end

-- Lets go what is older than the history's time: a search, for times never fall.
local function expire(s, key, ttl)
  if s.floor >= s.top or s.oldest + ttl > now then return end
  local low, high = s.floor + 1, s.top + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if time_of(key, middle) + ttl > now then high = middle else low = middle + 1 end
  end
  s.floor = low - 1
  s.oldest = low <= s.top and time_of(key, low) or now
  s.dirty = true
end

-- A position without an epoch is never given: creates or renews what is stored, `m`, and marks what is to be told.
local function touch(key, m, nonce, ttl, keep)
  local s
  if m then
    s = load(m)
  else
    s = { epoch = nonce, lineage = '', top = 0, floor = 0, last = now, oldest = now, ids = 0, expires = 0, gone = 0 }
    s.word, s.dirty = true, true
  end
  if m and s.replid ~= replid then
    s.lineage = sub(s.lineage .. s.epoch .. pack('>I8', s.top), -LINEAGE_BYTES)
    s.epoch = nonce
    s.word, s.dirty = true, true
  end
  expire(s, key, ttl)
  -- The key's time is set a sixteenth longer than asked, so that not every use has to set it.
  if s.expires < now + keep or s.expires > now + 2 * keep then
    s.expires = now + math.floor(keep / 16 * 17)
    s.renew, s.dirty = true, true
  end
  if s.floor - s.gone >= GONE_MAX then
    drop(key, s.gone + 1, s.floor)
    s.gone, s.dirty = s.floor, true
  end
  return s
end

-- Stores the state if it changed; `s.m` is what is stored then.
local function save(s, key, ...)
  if s.dirty then
    s.m = state(s)
    call('HSET', key, 'm', s.m, ...)
    s.dirty = false
  end
  if s.renew then
    call('PEXPIREAT', key, string.format('%.0f', s.expires))
    s.renew = false
  end
end

local function say_word(s, key, channel, flags)
  if s.word then
    tell(s, key, channel, flags, s.top, {})
    s.word = false
  end
end

-- Ids older than the window, or too many, are let go, those stored together at once; so an id is named by one `j` only.
-- At least those up to `upto` go. `stored` is the last offset that has its id.
local function forget_ids(s, key, window, most, stored, upto)
  local gone, last = {}, s.ids + IDS_BATCH
  while s.ids < stored and (s.ids < last or s.ids < upto) do
    local field = 'j' .. pack('>I8', s.ids + 1)
    local together = call('HGET', key, field)
    local count = 1
    if together then
      if s.ids >= upto and unpack_from('>I8', together) + window > now and s.top - s.ids <= most then break end
      local here, length = 9, #together
      count = 0
      while here < length do
        local bytes = unpack_from('>I2', together, here)
        gone[#gone + 1] = 'i' .. sub(together, here + 2, here + 1 + bytes)
        here, count = here + 2 + bytes, count + 1
      end
      gone[#gone + 1] = field
    end
    s.ids = s.ids + count
    if #gone >= CHUNK then
      call('HDEL', key, unpack(gone))
      gone = {}
    end
  end
  if #gone > 0 then call('HDEL', key, unpack(gone)) end
end

local operations = {}
local arguments = { P = 8, E = 4, R = 7, C = 4, K = 2 } -- then each publication's: the last of these is their count
local each = { P = 2, E = 1 }

-- Publications on a positioned channel. Answers P, their count, for each of them whether its id was seen before and its
-- offset, and the state.
function operations.P(key)
  local channel, nonce, ttl, keep = arg(), arg(), tonumber(arg()), tonumber(arg())
  local size, window, most, count = tonumber(arg()), tonumber(arg()), tonumber(arg()), tonumber(arg())
  local wanted = { 'm' }
  for i = 1, count do wanted[i + 1] = 'i' .. ARGV[at + 2 * i - 1] end
  local stored = call('HMGET', key, unpack(wanted))
  local s = touch(key, stored[1], nonce, ttl, keep)
  if s.word then
    save(s, key)
    say_word(s, key, channel, 0)
  end
  local previous, time = s.top, math.max(now, s.last)
  local stamp = pack('>I8', time)
  local places, changes, envelopes, new, ids = {}, {}, {}, {}, { stamp }
  local n = 0
  for i = 1, count do
    local id, envelope = ARGV[at + 1], ARGV[at + 2]
    at = at + 2
    local seen = new[id] or stored[i + 1]
    if seen and unpack_from('>I8', seen, 9) + window <= now then
      forget_ids(s, key, window, most, previous, (unpack_from('>I8', seen)))
      seen = nil
    end
    if seen then
      places[i] = '\1' .. sub(seen, 1, 8)
    else
      s.top = s.top + 1
      local offset = pack('>I8', s.top)
      local place = offset .. stamp
      new[id], places[i] = place, '\0' .. offset
      changes[4 * n + 1], changes[4 * n + 2] = 'o' .. offset, stamp .. envelope
      changes[4 * n + 3], changes[4 * n + 4] = 'i' .. id, place
      ids[2 * n + 2], ids[2 * n + 3] = pack('>I2', #id), id
      n = n + 1
      envelopes[n] = envelope
    end
  end
  if n > 0 then
    changes[4 * n + 1], changes[4 * n + 2] = 'j' .. pack('>I8', previous + 1), table.concat(ids)
    if s.floor == previous then s.oldest = time end
    s.last, s.floor, s.dirty = time, math.max(s.floor, s.top - size), true
    if math.floor(s.top / IDS_EVERY) > math.floor(previous / IDS_EVERY) then
      forget_ids(s, key, window, most, previous, 0)
    end
  end
  save(s, key, unpack(changes))
  if n > 0 then tell(s, key, channel, 0, previous, envelopes) end
  return pack('>BI4', 80, count) .. table.concat(places) .. s.m
end

-- Publications on an ephemeral channel: a counter under the same rule. Answers E, their count and the state.
function operations.E(key)
  local channel, nonce, keep, count = arg(), arg(), tonumber(arg()), tonumber(arg())
  local s = touch(key, call('HGET', key, 'm'), nonce, 0, keep)
  local previous, envelopes = s.top, {}
  for i = 1, count do envelopes[i] = arg() end
  local top = previous + count
  s.top, s.floor, s.ids, s.gone, s.last, s.dirty = top, top, top, top, now, true
  save(s, key)
  tell(s, key, channel, 1, previous, envelopes)
  return pack('>BI4', 69, count) .. s.m
end

-- A read of history and position: since ('' for none), limit, reverse (1 or 0).
function operations.R(key)
  local channel, nonce, ttl, keep = arg(), arg(), tonumber(arg()), tonumber(arg())
  local since, limit, reverse = tonumber(arg()), tonumber(arg()), arg() == '1'
  local s = touch(key, call('HGET', key, 'm'), nonce, ttl, keep)
  save(s, key)
  say_word(s, key, channel, 0)
  local from, to, step
  if reverse then
    from, to, step = since and math.min(since - 1, s.top) or s.top, s.floor + 1, -1
  else
    from, to, step = since and math.max(since, s.floor) + 1 or s.floor + 1, s.top, 1
  end
  local asked = math.max(0, (to - from) * step + 1)
  local more, wanted, bytes, page = asked > limit and 1 or 0, math.min(asked, limit), 0, {}
  local done = 0
  while done < wanted do
    local fields = {}
    for i = done, math.min(wanted, done + CHUNK) - 1 do fields[#fields + 1] = entry_at(from + i * step) end
    local entries = call('HMGET', key, unpack(fields))
    for i = 1, #fields do
      local entry = entries[i]
      if entry then
        bytes = bytes + #entry
        if bytes > PAGE_BYTES and #page > 0 then return { 'R', s.m, 1, page } end
        page[#page + 1] = sub(fields[i], 2)
        page[#page + 1] = sub(entry, 9)
      end
    end
    done = done + #fields
  end
  return { 'R', s.m, more, page }
end

-- Removes the history; the position stays.
function operations.C(key)
  local channel, nonce, ttl, keep = arg(), arg(), tonumber(arg()), tonumber(arg())
  local s = touch(key, call('HGET', key, 'm'), nonce, ttl, keep)
  local gone = s.gone
  if gone < s.top then s.floor, s.gone, s.dirty = s.top, s.top, true end
  save(s, key)
  say_word(s, key, channel, 0)
  drop(key, gone + 1, s.top)
  return { 'C', s.m }
end

-- The canary: comes back over the subscription, with the server's life and that of its data.
function operations.K(key)
  local nonce, payload = arg(), arg()
  local life = call('GET', key)
  if not life then
    life = nonce
    call('SET', key, life)
  end
  call(publish_command, key, pack('>B', 2) .. replid .. life .. payload)
  return { 'K', replid, life, tonumber(string.match(info, 'connected_slaves:(%d+)')) or 0 }
end

local answers = {}
for i = 1, #KEYS do
  local letter, first = arg(), at
  local last = first + arguments[letter]
  local count = each[letter] and tonumber(ARGV[last]) or 1
  local done, answer = pcall(operations[letter], KEYS[i])
  if not done then
    answer = { 'X', type(answer) == 'table' and answer.err or tostring(answer), count }
  end
  at = last + count * (each[letter] or 0)
  answers[i] = answer
end
return answers
