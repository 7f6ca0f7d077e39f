-- The one script of the bus: publishes, reads and clears channels, and sounds the canary.
--
-- Per channel one HASH, so that position, lineage, history and ids live and die together:
--   m        replid (40) epoch (8), 7 numbers of 8 bytes, big endian: top floor last_ms oldest_ms ids expires_ms gone;
--            lineage (16 each)
--   o<first> each envelope behind its length (4): a chunk, the publications of one call
--   j<first> time_ms (8), whether any of its ids has an i (1), then each id behind its length (2); kept while either the
--            chunk or its ids are
--   x        block (8), then a byte for each chunk that begins in it: its first offset less 256 * block; x<block> are those
--            of the blocks before
--   h<node>  sequence (8) time_ms (8): the highest of a node's publications; H the nodes that have one, 8 bytes each
--   i<id>    offset (8) time_ms (8): where an id stands that is not of a node's sequence
-- History is what is in (floor, top]; chunks of (gone, top] and ids of (ids, top] are kept. Both stand between chunks.
-- What a publication costs here limits the server: so a chunk is stored and told as it came, unopened, if its ids are
-- higher than any before of that node. Every string that is made is hashed, byte by byte: long ones are made once.
--
-- KEYS: one per operation. ARGV: the publish command, then each operation's: channel, parameters (the letter first),
-- and for P ids and envelopes, for E envelopes, for K the payload.
-- Answers one value per operation; what fails alone fails as {'X', message, publications in it}.
-- A later release adds fields; it does not change what these mean.
-- Epochs and replication ids are never numbers here: a number has 53 bits.

local FIELDS_MAX = 500     -- fields of one command: Lua's stack is bounded
local LOOKED_AT = 64       -- fields read at a time where it is not known how many are wanted
local BLOCK = 256          -- offsets of a block; no chunk is longer
local LINEAGE_BYTES = 128  -- the last 8
local GONE_MAX = 64        -- publications below the floor are removed together
local IDS_EVERY = 64       -- publications between two looks at old ids
local IDS_BATCH = 256      -- ids let go in one look, about; several times what comes between two looks
local PAGE_BYTES = 4194304 -- a page is cut here

local call, pack, unpack_from, sub, floor = redis.call, struct.pack, struct.unpack, string.sub, math.floor
local byte = string.byte
local clock = call('TIME')
local now = clock[1] * 1000 + floor(clock[2] / 1000)
local info = call('INFO', 'replication')
local replid = string.match(info, 'master_replid:(%x+)')
local publish_command = ARGV[1]

local function bytes8(number)
  return pack('>I8', number)
end

-- A position without an epoch is never given: creates or renews what is stored, `m`, and marks what is to be told.
local function touch(m, nonce, keep)
  local s
  if m then
    local top, low, last, oldest, ids, expires, gone = unpack_from('>I8I8I8I8I8I8I8', m, 49)
    s = {
      epoch = sub(m, 41, 48), lineage = sub(m, 105), top = top, floor = low, last = last, oldest = oldest, ids = ids,
      expires = expires, gone = gone, low = math.min(ids, gone), m = m, word = false, dirty = false, renew = false,
    }
    if sub(m, 1, 40) ~= replid then
      s.lineage = sub(s.lineage .. s.epoch .. bytes8(top), -LINEAGE_BYTES)
      s.epoch = nonce
      s.word, s.dirty = true, true
    end
  else
    s = {
      epoch = nonce, lineage = '', top = 0, floor = 0, last = now, oldest = now, ids = 0, expires = 0, gone = 0, low = 0,
      m = false, word = true, dirty = true, renew = false,
    }
  end
  -- The key's time is set a sixteenth longer than asked, so that not every use has to set it.
  if s.expires < now + keep or s.expires > now + 2 * keep then
    s.expires = now + floor(keep / 16 * 17)
    s.renew, s.dirty = true, true
  end
  return s
end

-- The fields of a letter for some of the numbers or names `of`.
local function fields_of(letter, of, from, most)
  local fields = {}
  for i = from, math.min(#of, from + most - 1) do
    local name = of[i]
    fields[#fields + 1] = letter .. (type(name) == 'number' and bytes8(name) or name)
  end
  return fields
end

-- Removes a field for each of `of`.
local function drop(key, letter, of)
  for from = 1, #of, FIELDS_MAX do call('HDEL', key, unpack(fields_of(letter, of, from, FIELDS_MAX))) end
end

-- Goes over what is stored for each of `of`: its index and the value.
local function each_of(key, letter, of)
  local i, from, values = 0, 1, nil
  return function()
    i = i + 1
    if i > #of then return nil end
    if not values or i == from + LOOKED_AT then
      from = i
      values = call('HMGET', key, unpack(fields_of(letter, of, from, LOOKED_AT)))
    end
    return i, values[i - from + 1]
  end
end

local function reverse_order(list)
  local length = #list
  for i = 1, floor(length / 2) do list[i], list[length + 1 - i] = list[length + 1 - i], list[i] end
end

-- The first block in which a chunk that is kept may begin.
local function block_after(low)
  return floor((low + 1) / BLOCK)
end

-- Offsets at which chunks begin, from the one that holds `first` to that which holds `last`.
local function starts_between(key, first, last)
  local open = call('HGET', key, 'x')
  local open_block = open and unpack_from('>I8', open)
  local found, n = {}, 0
  -- The bytes of a block, and the first and last of them that say where chunks begin.
  local function block_of(block)
    if block == open_block then return open, 9, #open end
    local bytes = block >= 0 and call('HGET', key, 'x' .. bytes8(block)) or ''
    return bytes, 1, #bytes
  end
  for block = floor(first / BLOCK), floor(last / BLOCK) do
    local base, bytes, at, length = BLOCK * block, block_of(block)
    if n == 0 then
      -- The last that begins at `first` or before.
      local low, high = at - 1, length
      while low < high do
        local middle = math.ceil((low + high) / 2)
        if base + byte(bytes, middle) <= first then low = middle else high = middle - 1 end
      end
      if low < at then
        local before, from, to = block_of(block - 1)
        if to >= from then n, found[1] = 1, base - BLOCK + byte(before, to) end
      else
        at = low
      end
    end
    while at <= length do
      local start = base + byte(bytes, at)
      if start > last then return found end
      n, at = n + 1, at + 1
      found[n] = start
    end
  end
  return found
end

-- Stores the state if it changed, and what goes with it; `s.m` is what is stored then.
local function save(s, key, ...)
  if s.dirty then
    local low = math.min(s.ids, s.gone)
    if low > s.low then
      drop(key, 'j', starts_between(key, s.low + 1, low))
      local blocks = {}
      for block = block_after(s.low), block_after(low) - 1 do blocks[#blocks + 1] = block end
      drop(key, 'x', blocks)
      s.low = low
    end
    s.m = replid .. s.epoch
      .. pack('>I8I8I8I8I8I8I8', s.top, s.floor, s.last, s.oldest, s.ids, s.expires, s.gone) .. s.lineage
    call('HSET', key, 'm', s.m, ...)
    s.dirty = false
  end
  if s.renew then
    call('PEXPIREAT', key, string.format('%.0f', s.expires))
    s.renew = false
  end
end

-- Tells of the publications (previous, top]; of none: of the position.
local function tell(s, key, channel, flags, previous, envelopes)
  call(publish_command, channel, pack('>BBI2', 1, flags, #key) .. key .. s.epoch
    .. pack('>I8I8B', previous, s.top, #s.lineage / 16) .. s.lineage .. envelopes)
end

local function say_word(s, key, channel, flags)
  if s.word then
    save(s, key)
    tell(s, key, channel, flags, s.top, '')
    s.word = false
  end
end

-- What stands behind lengths, from the byte `at` on.
local function parts(bytes, at, layout)
  local found, length = {}, nil
  while at <= #bytes do
    length, at = unpack_from(layout, bytes, at)
    found[#found + 1] = sub(bytes, at, at + length - 1)
    at = at + length
  end
  return found
end

local function time_of(key, start)
  local time = call('HGET', key, 'j' .. bytes8(start))
  return time and (unpack_from('>I8', time)) or 0
end

-- Lets go what is older than the history's time: a search, for times never fall. The oldest alone is looked at first.
local function expire(s, key, ttl)
  if s.floor >= s.top or s.oldest + ttl > now then return end
  local starts, span, bound = nil, GONE_MAX, nil
  repeat
    bound, span = math.min(s.top, s.floor + span), 8 * span
    starts = starts_between(key, s.floor + 1, bound)
  until bound == s.top or (#starts > 0 and time_of(key, starts[#starts]) + ttl > now)
  local low, high = 1, #starts + 1
  local middle = low
  while low < high do
    if time_of(key, starts[middle]) + ttl > now then high = middle else low = middle + 1 end
    middle = floor((low + high) / 2)
  end
  s.floor = starts[low] and math.max(s.floor, starts[low] - 1) or s.top
  s.oldest = starts[low] and time_of(key, starts[low]) or now
  s.dirty = true
end

-- Removes chunks below the floor, once there are enough of them.
local function tidy(s, key)
  if s.floor - s.gone < GONE_MAX then return end
  local starts = starts_between(key, s.gone + 1, math.min(s.floor + 1, s.top))
  local kept = s.top + 1
  if s.floor < s.top then kept = table.remove(starts) end
  if #starts > 0 then
    drop(key, 'o', starts)
    s.gone, s.dirty = kept - 1, true
  end
end

-- Ids older than the window, or too many, are let go, a chunk's at once. At least those up to `upto` go.
local function forget_ids(s, key, window, most, stored, upto)
  if s.ids >= stored then return end
  local bound = math.min(stored, math.max(s.ids + IDS_BATCH, upto > 0 and upto + BLOCK or 0))
  local starts = starts_between(key, s.ids + 1, bound)
  local gone, last = {}, stored
  for i, ids in each_of(key, 'j', starts) do
    local start = starts[i]
    local is_fresh = ids and unpack_from('>I8', ids) + window > now and s.top - start < most
    if (i == #starts and bound < stored) or (start > upto and is_fresh) then
      last = start - 1
      break
    end
    for _, id in ipairs(ids and byte(ids, 9) == 1 and parts(ids, 10, '>I2') or {}) do
      if sub(id, 1, 1) ~= 'n' then gone[#gone + 1] = id end
    end
  end
  drop(key, 'i', gone)
  s.ids, s.dirty = last, true
end

-- A node publishes here for the first time: nodes whose time is over are let go.
local function nodes_with(key, node, window)
  local kept, gone = { node }, {}
  local nodes = call('HGET', key, 'H') or ''
  for at = 1, #nodes, 8 do
    local other = sub(nodes, at, at + 7)
    local high = call('HGET', key, 'h' .. other)
    if high and unpack_from('>I8', high, 9) + window > now then
      if other ~= node then kept[#kept + 1] = other end
    else
      gone[#gone + 1] = 'h' .. other
    end
  end
  if #gone > 0 then call('HDEL', key, unpack(gone)) end
  return table.concat(kept)
end

-- Where the nodes' ids among these stand. From the newest back: what was stored before a chunk that came unopened is lower
-- than its ids, so where that one begins below the lowest sequence looked for, the node is done.
local function stored_ids(s, key, window, ids_sought)
  local found, lowest, left, last = {}, {}, 0, s.top
  for _, id in ipairs(ids_sought) do
    if sub(id, 1, 1) == 'n' then
      local node, sequence = sub(id, 2, 9), unpack_from('>I8', id, 10)
      if not lowest[node] then left = left + 1 end
      lowest[node] = math.min(lowest[node] or sequence, sequence)
    end
  end
  while left > 0 and last > s.ids do
    local starts = starts_between(key, math.max(s.ids + 1, last - 4 * BLOCK), last)
    if #starts == 0 then break end
    last = starts[1] - 1
    reverse_order(starts)
    for i, ids in each_of(key, 'j', starts) do
      if left == 0 or (ids and unpack_from('>I8', ids) + window <= now) then return found end
      local node = ids and byte(ids, 9) == 0 and sub(ids, 13, 20)
      if ids and (not node or (lowest[node] and unpack_from('>I8', ids, #ids - 7) >= lowest[node])) then
        for n, id in ipairs(parts(ids, 10, '>I2')) do
          found[id] = found[id] or bytes8(starts[i] + n - 1) .. sub(ids, 1, 8)
        end
      end
      if node and lowest[node] and unpack_from('>I8', ids, 21) <= lowest[node] then
        lowest[node], left = nil, left - 1
      end
    end
  end
  return found
end

-- Publications of which some may be here: each is looked for. Gives the ids and envelopes of those that are not, how
-- many these are, fields to be stored, and each one's answer.
local function sift(s, key, window, most, ids, envelopes, stamp)
  local new_ids, new_envelopes, fields, places, new, highs, count = {}, {}, {}, {}, {}, {}, 0
  local stored, previous = nil, s.top
  for i, id in ipairs(ids) do
    local node, sequence, seen = nil, nil, new[id]
    if sub(id, 1, 1) ~= 'n' then
      seen = seen or call('HGET', key, 'i' .. id)
    elseif not seen then
      node, sequence = sub(id, 2, 9), unpack_from('>I8', id, 10)
      if highs[node] == nil then
        local high = call('HGET', key, 'h' .. node)
        highs[node] = high and unpack_from('>I8', high) or -1
      end
      if sequence <= highs[node] then
        stored = stored or stored_ids(s, key, window, ids)
        seen = stored[id]
      end
    end
    if seen and unpack_from('>I8', seen, 9) + window <= now then
      forget_ids(s, key, window, most, previous, (unpack_from('>I8', seen)))
      seen = nil
    end
    if seen then
      places[i] = '\1' .. sub(seen, 1, 8)
    else
      count = count + 1
      local offset = bytes8(previous + count)
      new[id], places[i] = offset .. stamp, '\0' .. offset
      new_ids[count], new_envelopes[count] = pack('>I2', #id) .. id, pack('>I4', #envelopes[i]) .. envelopes[i]
      if node then
        if highs[node] < 0 then
          call('HSET', key, 'H', nodes_with(key, node, window))
        end
        highs[node] = math.max(highs[node], sequence)
        call('HSET', key, 'h' .. node, bytes8(highs[node]) .. stamp)
      else
        fields[#fields + 1] = 'i' .. id
        fields[#fields + 1] = new[id]
      end
    end
  end
  return table.concat(new_ids), table.concat(new_envelopes), count, fields, table.concat(places)
end

local operations = {}

-- Publications on a positioned channel. Answers N, their count, the offset before them and the state; or P, their
-- count, for each of them whether its id was seen before and its offset, and the state.
function operations.P(key, channel, parameters, ids, envelopes)
  local nonce, ttl, keep, size, window, most, count, node, first, last =
    unpack_from('>c8I8I8I4I8I4I2c8I8I8', parameters, 2)
  local stored = call('HMGET', key, 'm', 'x', 'h' .. node)
  local s = touch(stored[1], nonce, keep)
  expire(s, key, ttl)
  say_word(s, key, channel, 0)
  local x, high = stored[2], stored[3]
  local previous, time = s.top, math.max(now, s.last)
  local stamp, keyed = bytes8(time), '\0'
  local places, more, mark, mark_at -- of publications that are sifted; of anything rare; of the node
  -- No node: some ids are not of one node's sequence, or do not rise.
  if last == 0 or (high and unpack_from('>I8', high) >= first) then
    ids, envelopes, count, more, places =
      sift(s, key, window, most, parts(ids, 1, '>I2'), parts(envelopes, 1, '>I4'), stamp)
    keyed, mark, mark_at = '\1', 'x', ''
  else
    mark, mark_at = 'h' .. node, bytes8(last) .. stamp
    if not high then more = { 'H', nodes_with(key, node, window) } end
  end
  if count == 0 then
    tidy(s, key)
    save(s, key)
    return pack('>BI2', 80, #places / 9) .. places .. s.m
  end
  local block = floor((previous + 1) / BLOCK)
  local open = x and unpack_from('>I8', x)
  if x and open ~= block then
    if open >= block_after(s.low) then
      more = more or {}
      more[#more + 1] = 'x' .. sub(x, 1, 8)
      more[#more + 1] = sub(x, 9)
    end
    x = nil
  end
  local start = bytes8(previous + 1)
  if s.floor == previous then s.oldest = time end
  s.top = previous + count
  s.last, s.floor, s.dirty = time, math.max(s.floor, s.top - size), true
  if floor(s.top / IDS_EVERY) > floor(previous / IDS_EVERY) then
    forget_ids(s, key, window, most, previous, 0)
  end
  if more and #more > 0 then call('HSET', key, unpack(more)) end
  save(
    s, key, mark, mark_at, 'x', (x or bytes8(block)) .. string.char(previous + 1 - BLOCK * block),
    'o' .. start, envelopes, 'j' .. start, stamp .. keyed .. ids
  )
  tidy(s, key)
  save(s, key)
  tell(s, key, channel, 0, previous, envelopes)
  if places then return pack('>BI2', 80, #places / 9) .. places .. s.m end
  return pack('>BI2I8', 78, count, previous) .. s.m
end

-- Publications on an ephemeral channel: a counter under the same rule. Answers E, their count and the state.
function operations.E(key, channel, parameters, envelopes)
  local nonce, keep, count = unpack_from('>c8I8I2', parameters, 2)
  local s = touch(call('HGET', key, 'm'), nonce, keep)
  if s.low < s.top then
    -- It had positions before: what is left of them would stay.
    call('UNLINK', key)
    s.renew = true
  end
  local previous = s.top
  local top = previous + count
  s.top, s.floor, s.ids, s.gone, s.low, s.last, s.dirty = top, top, top, top, top, now, true
  save(s, key)
  tell(s, key, channel, 1, previous, envelopes)
  return pack('>BI2', 69, count) .. s.m
end

-- A read of history and position: since (behind whether there is one), limit, reverse (1 or 0). Answers R, the state,
-- whether there is more, the offsets (after, last] that are meant, and chunks with their first offsets.
function operations.R(key, channel, parameters)
  local nonce, ttl, keep, has_since, since, limit, reverse = unpack_from('>c8I8I8BI8I4B', parameters, 2)
  local s = touch(call('HGET', key, 'm'), nonce, keep)
  expire(s, key, ttl)
  tidy(s, key)
  save(s, key)
  say_word(s, key, channel, 0)
  local after, last = s.floor, s.top
  if has_since == 1 and reverse == 1 then last = math.min(since - 1, last) end
  if has_since == 1 and reverse == 0 then after = math.max(since, after) end
  local more, asked, page, bytes = 0, math.max(0, last - after), {}, 0
  if asked > limit then
    more = 1
    if reverse == 1 then after = last - limit else last = after + limit end
  end
  local starts = last > after and starts_between(key, after + 1, last) or {}
  if reverse == 1 then reverse_order(starts) end
  for i, chunk in each_of(key, 'o', starts) do
    if chunk then
      bytes = bytes + #chunk
      if bytes > PAGE_BYTES and #page > 0 then
        more = 1
        if reverse == 1 then after = starts[i - 1] - 1 else last = starts[i] - 1 end
        break
      end
      page[#page + 1] = bytes8(starts[i])
      page[#page + 1] = chunk
    end
  end
  return { 'R', s.m, more, bytes8(math.max(after, 0)) .. bytes8(math.max(last, 0)), page }
end

-- Removes the history; the position stays.
function operations.C(key, channel, parameters)
  local nonce, ttl, keep = unpack_from('>c8I8I8', parameters, 2)
  local s = touch(call('HGET', key, 'm'), nonce, keep)
  if s.gone < s.top then
    drop(key, 'o', starts_between(key, s.gone + 1, s.top))
    s.floor, s.gone, s.dirty = s.top, s.top, true
  end
  save(s, key)
  say_word(s, key, channel, 0)
  return { 'C', s.m }
end

-- The canary: comes back over the subscription, with the server's life and that of its data. Without a payload it is
-- written instead, for WAIT counts from a write on.
function operations.K(key, channel, parameters, payload)
  local life = call('GET', key)
  if not life then
    life = sub(parameters, 2, 9)
    call('SET', key, life)
  end
  if payload == '' then
    call('SETRANGE', key, 0, life)
  else
    call(publish_command, channel, pack('>B', 2) .. replid .. life .. payload)
  end
  return { 'K', replid, life, tonumber(string.match(info, 'connected_slaves:(%d+)')) or 0 }
end

local arguments = { P = 4, E = 3, R = 2, C = 2, K = 3 }
local counted = { P = 42, E = 18 } -- where a letter's count stands in its parameters

local answers, at = {}, 2
for i = 1, #KEYS do
  local parameters = ARGV[at + 1]
  local letter = sub(parameters, 1, 1)
  local done, answer = pcall(operations[letter], KEYS[i], ARGV[at], parameters, ARGV[at + 2], ARGV[at + 3])
  if not done then
    local count = counted[letter] and unpack_from('>I2', parameters, counted[letter]) or 1
    answer = { 'X', type(answer) == 'table' and answer.err or tostring(answer), count }
  end
  at = at + arguments[letter]
  answers[i] = answer
end
return answers
