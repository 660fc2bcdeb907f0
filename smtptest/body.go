package smtptest

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"hash"
	"io"
	"strconv"
	"strings"
)

// data executes DATA and everything up to the final reply.
func (c *conn) data(line string) ending {
	if c.crowded() || !c.s.KeepRefusedChunks && c.wire.Unread() > 0 { // RFC 2920, 3.1: DATA is the last of its group; the body must wait for 354
		c.say("554 5.5.0 SMTP protocol error: nothing may follow DATA before its reply")
		return hangUp
	}
	var own string
	b := c.meet(Event{Step: Data, Line: line})
	end := c.answer(b, func() string {
		if c.env.chunks > 0 {
			own = underWay
			return own
		}
		if own = c.ask(line); positive(own) {
			return "354 Continue"
		}
		return own
	})
	said := own
	if b.reply != "" {
		said = b.reply
	}
	if end != goOn || !strings.HasPrefix(said, "354") {
		return end
	}
	taking := positive(own)
	c.beginBody()
	early, end := c.readBody()
	if end != goOn {
		return end
	}
	c.log("C", ".")
	if !c.s.pipelining && c.crowded() {
		c.say("500 5.5.1 Invalid command: Pipelining not supported")
		return hangUp
	}
	return c.finish(early, func() string {
		if !taking {
			return "554 5.5.1 No valid recipients"
		}
		return c.ask(".")
	})
}

// finish ends a message whose last octet has arrived. early says that a fault has already answered it.
func (c *conn) finish(early bool, ask func() string) ending {
	c.is("answering the final dot")
	var before blow
	if !early {
		before = c.meet(Event{Step: FinalDot, Bytes: c.msg.size})
	}
	if before.refuses() && before.reply == "" {
		return before.end
	}
	c.msg.refused = c.msg.refused || early || before.refuses()
	own := ask()
	if own == "" {
		return lost
	}
	reply, end := own, before.end
	if before.reply != "" {
		reply = before.reply
	}
	if c.msg.taken {
		after := c.meet(Event{Step: Accepted, Bytes: c.msg.size})
		if after.reply != "" {
			reply = after.reply
		} else if after.end != goOn {
			return after.end
		}
		end = max(end, after.end)
	}
	c.env = envelope{}
	if end == goOn {
		c.mindBehind()
	}
	if !early {
		c.say(reply)
	}
	c.finalTurns = c.wire.turns.Load()
	return end
}

// mindBehind applies Server.Behind to what has arrived after the final dot.
func (c *conn) mindBehind() {
	if c.s.Behind == HabitNone {
		return
	}
	switch c.s.Behind {
	case HabitRefuse:
		c.refuse = c.arrived()
	case HabitDiscard:
		c.discard = true
	}
}

// arrived reads what has arrived into the buffer, and returns its length.
func (c *conn) arrived() int {
	for c.wire.Unread() > 0 && c.br.Buffered() < c.br.Size() {
		if _, err := c.br.Peek(c.br.Buffered() + 1); err != nil {
			break
		}
	}
	return c.br.Buffered()
}

// discardArrived discards what has arrived.
func (c *conn) discardArrived() {
	c.discard = false
	if n := c.arrived(); n > 0 {
		c.note("discarded what was pipelined: ", strconv.Itoa(n), " octets")
		c.br.Discard(n)
	}
}

// incoming is a message being received.
type incoming struct {
	max  int64 // 0 or negative means no limit
	drop bool  // keep no octets

	buf     []byte // the octets kept, or those not hashed yet
	hash    hash.Hash
	size    int64
	chunked bool
	refused bool // too large
	taken   bool
}

// keepBuffer is how much memory a connection keeps for its next message.
const keepBuffer = 1 << 20

func (m *incoming) begin() {
	if cap(m.buf) > keepBuffer {
		m.buf = nil
	}
	m.buf = m.buf[:0]
	if m.hash == nil {
		m.hash = sha256.New()
	}
	m.hash.Reset()
	m.size, m.chunked, m.refused, m.taken = 0, false, false, false
}

func (m *incoming) write(p []byte) {
	m.size += int64(len(p))
	if m.tooBig() {
		m.buf = nil
		return
	}
	m.buf = append(m.buf, p...)
	if m.drop && len(m.buf) >= 32<<10 {
		m.hash.Write(m.buf)
		m.buf = m.buf[:0]
	}
}

func (m *incoming) tooBig() bool { return m.max > 0 && m.size > m.max }

// end returns the octets, unless they are dropped, and their hash.
func (m *incoming) end() (body []byte, sum [32]byte) {
	m.hash.Write(m.buf)
	m.hash.Sum(sum[:0])
	if !m.drop {
		body = bytes.Clone(m.buf)
	}
	return body, sum
}

func (c *conn) beginBody() {
	c.msg.begin()
	c.metBody = nil
	c.events[Body]++
	c.is("in a body")
}

// meetBody applies the faults to the body received so far. It reports whether one of them has answered the message.
func (c *conn) meetBody(early *bool) ending {
	if len(c.s.faultList()) == 0 {
		return goOn
	}
	b := c.meet(Event{Step: Body, Bytes: c.msg.size})
	if b.reply != "" {
		*early = true
		c.say(b.reply)
		c.bw.Flush()
	}
	return b.end
}

// readBody reads a body up to its final dot. early says that a fault has answered it.
func (c *conn) readBody() (early bool, end ending) {
	bol := true // at the beginning of a line
	cr := false // the previous octet was CR
	for {
		p, err := c.br.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return early, lost
		}
		if bol && p[0] == '.' {
			if len(p) == 3 && p[1] == '\r' && p[2] == '\n' {
				return early, goOn
			}
			p = p[1:]
		}
		c.msg.write(p)
		if end := c.meetBody(&early); end != goOn {
			return early, end
		}
		// Only CRLF ends a line. A dot after a bare LF ends nothing, whatever some relays think.
		n := len(p)
		bol = n > 0 && p[n-1] == '\n' && (n > 1 && p[n-2] == '\r' || n == 1 && cr)
		cr = n > 0 && p[n-1] == '\r'
	}
}

// parseBdat parses the argument of BDAT as go-smtp does.
func parseBdat(arg string) (size int64, last, ok bool) {
	f := strings.Fields(arg)
	if len(f) == 0 || len(f) > 2 {
		return 0, false, false
	}
	if len(f) == 2 {
		if last = strings.EqualFold(f[1], "LAST"); !last {
			return 0, false, false
		}
	}
	n, err := strconv.ParseUint(f[0], 10, 32)
	return int64(n), last, err == nil
}

// bdat executes BDAT and reads its chunk. go-smtp gets one empty chunk in place of all: in 0.25.1, a transfer that the client
// abandons can end the next one with its own error.
func (c *conn) bdat(line, arg string) ending {
	size, last, ok := parseBdat(arg)
	if !ok || !c.s.Chunking {
		c.say("500 5.5.1 BDAT not offered, or without a size")
		if c.s.KeepRefusedChunks {
			return goOn
		}
		return hangUp // the length of the chunk is unknown, so its octets cannot be told from commands
	}
	var b blow
	if c.env.open { // else it is refused anyway, and is a probe rather than part of a message
		b = c.meet(Event{Step: Bdat, Line: line, Bytes: c.chunked(), chunk: size})
	}
	if b.refuses() && b.end != goOn {
		return c.answer(b, nil)
	}
	if b.refuses() || len(c.env.to) == 0 {
		return c.refuseChunk(b, size)
	}

	if c.env.chunks == 0 {
		c.beginBody()
		c.msg.chunked = true
	}
	c.env.chunks++
	take := func() string { return c.ask("BDAT 0 LAST") }
	early, end, err := c.readChunk(size)
	if end != goOn {
		return end
	}
	if err != nil {
		if last && err == io.EOF {
			take() // the trap: see Server.Chunking
		}
		return lost
	}
	c.msg.refused = c.msg.refused || early
	if c.msg.tooBig() && !early {
		c.ask("RSET")
		c.env = envelope{}
		return c.answer(b, func() string { return "552 5.3.4 Max message size exceeded" })
	}
	if last {
		return c.finish(early, take)
	}
	if early {
		return goOn
	}
	return c.answer(b, func() string { return "250 2.0.0 Continue" })
}

// refuseChunk refuses a chunk, with the blow's reply or because there is no recipient.
func (c *conn) refuseChunk(b blow, size int64) ending {
	if !c.s.KeepRefusedChunks {
		if _, err := io.CopyN(io.Discard, c.br, size); err != nil {
			return lost
		}
	}
	if b.refuses() && (c.env.chunks > 0 || !c.s.KeepRefusedChunks) { // without this chunk the message is incomplete (RFC 3030, 2)
		c.ask("RSET")
		c.env = envelope{}
	}
	return c.answer(b, func() string { return "503 5.5.1 Missing RCPT TO command" })
}

// chunked returns how many octets of the message arrived in earlier chunks.
func (c *conn) chunked() int64 {
	if c.env.chunks == 0 {
		return 0
	}
	return c.msg.size
}

// readChunk reads a chunk. early says that a fault has answered it, err that it is truncated.
func (c *conn) readChunk(size int64) (early bool, end ending, err error) {
	for size > 0 {
		if _, err := c.br.Peek(1); err != nil {
			return early, goOn, err
		}
		n := int(min(size, int64(c.br.Buffered())))
		p, _ := c.br.Peek(n)
		c.msg.write(p)
		c.br.Discard(n)
		size -= int64(n)
		if end := c.meetBody(&early); end != goOn {
			return early, end, nil
		}
	}
	return early, goOn, nil
}
