package smtptest

import (
	"bufio"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// command reads the next command that is to be carried out.
func (c *conn) command() (string, ending) {
	for {
		if c.br.Buffered() == 0 {
			if end := c.await(); end != goOn {
				return "", end
			}
		}
		line, n, end := c.readLine()
		if end != goOn || c.refuse == 0 {
			return line, end
		}
		// It came behind a final dot, which this relay does not like.
		c.refuse = max(0, c.refuse-n)
		c.log("C", redact(line))
		verb, arg, _ := strings.Cut(line, " ")
		verb = strings.ToUpper(verb)
		if _, known := commands[verb]; !known {
			verb = ""
		}
		c.count(verb)
		if chunk, _, ok := parseBdat(arg); ok && verb == "BDAT" && !c.s.KeepRefusedChunks {
			n, err := io.CopyN(io.Discard, c.br, chunk)
			if err != nil {
				return "", lost
			}
			c.refuse = max(0, c.refuse-int(n))
		}
		c.say("503 5.5.1 pipelined after end of DATA")
	}
}

// readLine reads a line and returns it without its end, and its length with it.
func (c *conn) readLine() (line string, n int, end ending) {
	raw, err := c.br.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		c.say("500 5.5.2 Line too long")
		return "", 0, hangUp
	}
	if err != nil {
		return "", 0, lost
	}
	n = len(raw)
	raw = raw[:n-1]
	if len(raw) > 0 && raw[len(raw)-1] == '\r' {
		raw = raw[:len(raw)-1]
	}
	return string(raw), n, goOn
}

// await waits, everything having been answered, until the client says something.
func (c *conn) await() ending {
	c.bw.Flush()
	since := time.Now()
	var spared []*FaultHandle // have decided not to strike this time
	for {
		h, due, ok := c.beginWait(since, spared)
		if !ok {
			c.say("421 4.3.2 " + c.s.Name + " is shutting down")
			return hangUp
		}
		_, err := c.br.Peek(1)
		c.endWait()
		if err == nil {
			return goOn
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return lost
		}
		if h == nil || time.Now().Before(due) {
			continue // woken for another reason
		}
		c.events[Idle]++
		e := Event{Step: Idle}
		c.describe(&e)
		spared = append(spared, h)
		if !h.f.concerns(&e) || !h.strikes(true) {
			continue
		}
		b, done := c.suffer(h, Idle)
		if b.reply != "" {
			c.say(b.reply)
			c.bw.Flush()
		}
		if done && b.end != goOn {
			return b.end
		}
	}
}

// nextIdleFault returns the fault that will strike first if the connection stays idle, and when.
func (c *conn) nextIdleFault(since time.Time, spared []*FaultHandle) (first *FaultHandle, due time.Time) {
	for _, h := range c.s.faultList() {
		if h.f.At != Idle || h.f.elsewhere(c.stats.Conn, c.stats.Addr) || slices.Contains(spared, h) {
			continue
		}
		if at := since.Add(h.f.Delay); first == nil || at.Before(due) {
			first, due = h, at
		}
	}
	return first, due
}

// beginWait notes that the connection waits for a command: until due, if that is not zero, when h wants to strike or, without
// h, a relay that is being closed loses its patience. It reports false if a relay that is being closed waits no more. Faults
// are looked at under the lock under which the connection becomes idle: one that is set later finds it so and wakes it.
func (c *conn) beginWait(since time.Time, spared []*FaultHandle) (h *FaultHandle, due time.Time, ok bool) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.where = "waiting for a command"
	if c.env.open {
		c.where += " in a transaction"
	}
	switch {
	case c.s.closing:
		if since.Before(c.s.closedAt) {
			since = c.s.closedAt
		}
		due = since.Add(c.s.Delay + lastWords)
		if !c.env.open || c.env.refused || !time.Now().Before(due) {
			return nil, due, false
		}
	case !c.env.open:
		h, due = c.nextIdleFault(since, spared)
	}
	c.idle = true
	if !due.IsZero() {
		c.woken = true
		c.wire.SetReadDeadline(due)
	}
	return h, due, true
}

func (c *conn) endWait() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.idle = false
	c.where = "carrying out a command"
	if c.woken {
		c.woken = false
		c.wire.SetReadDeadline(time.Time{})
	}
}
