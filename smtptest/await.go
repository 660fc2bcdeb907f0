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

// command reads the next command to execute.
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
		// Pipelined after a final dot: HabitRefuse.
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

// readLine reads a line. It returns it without its line end, and its length with it.
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

// await flushes the replies and waits until the client sends something.
func (c *conn) await() ending {
	c.bw.Flush()
	since := time.Now()
	var spared []*FaultHandle // faults that have decided not to strike this time
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

// beginWait marks the connection as waiting for a command. If due is not zero, the wait ends then: h is the fault that may
// strike, or nil if the relay is being closed and stops waiting for the command. beginWait reports false if a relay that is being
// closed does not wait at all. It looks at the faults under the lock under which the connection becomes idle, so that a fault set
// later finds the connection idle and wakes it.
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
