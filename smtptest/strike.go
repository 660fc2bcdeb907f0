package smtptest

import (
	"slices"
	"strings"
	"time"
)

// concerns reports whether the filters match e.
func (f *Fault) concerns(e *Event) bool {
	switch {
	case f.At != e.Step && (f.At != 0 || e.Step == Idle):
		return false
	case f.elsewhere(e.Conn, e.Addr):
		return false
	case f.AfterMessages > e.Accepted || f.AfterRecipients > e.Recipients:
		return false
	case f.AfterBytes > e.Bytes:
		return false
	case f.Pipelined && !e.Pipelined:
		return false
	case f.Rcpt != "" && e.Step == Rcpt && !strings.EqualFold(f.Rcpt, e.Rcpt):
		return false
	case f.Rcpt != "" && e.Step != Rcpt && !containsFold(e.To, f.Rcpt):
		return false
	}
	return f.When == nil || f.When(*e)
}

// elsewhere reports whether the filters exclude conn, which was made to the address addr.
func (f *Fault) elsewhere(conn, addr int) bool {
	return f.Conn != 0 && f.Conn != conn || f.Addr != 0 && f.Addr != addr
}

// observes reports whether the fault only counts.
func (f *Fault) observes() bool {
	return f.Delay == 0 && !f.Stall && f.Reply == "" && !f.Drop && !f.Abort && !f.Discard
}

// strikes counts an event that the filters matched, and reports whether the fault strikes. If may is false, it does not.
func (h *FaultHandle) strikes(may bool) bool {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.gone || h.hits == h.f.Count {
		return false // another connection was first
	}
	h.passed++
	if !may || !h.turnLocked() || !h.tooFastLocked() {
		return false
	}
	h.hits++
	close(h.struck)
	h.struck = make(chan struct{})
	if h.hits == h.f.Count {
		h.s.dropFaultLocked(h)
	}
	return true
}

// turnLocked reports whether Nth and Every select the event counted last.
func (h *FaultHandle) turnLocked() bool {
	n := h.passed - max(h.f.Nth, 1) + 1
	return n > 0 && n%max(h.f.Every, 1) == 0
}

// tooFastLocked reports whether an event now exceeds Rate. If not, it is counted as having passed.
func (h *FaultHandle) tooFastLocked() bool {
	if h.f.Rate <= 0 {
		return true
	}
	burst := h.f.Burst
	if burst <= 0 {
		burst = max(1, int(h.f.Rate))
	}
	interval := time.Duration(float64(time.Second) / h.f.Rate)
	now := time.Now()
	full := h.full
	if full.Before(now) {
		full = now
	}
	if full.Sub(now) > time.Duration(burst-1)*interval {
		return true
	}
	h.full = full.Add(interval)
	return false
}

// blow is what a fault does to a connection after its Delay and Stall.
type blow struct {
	reply string
	end   ending
}

// challenges reports whether the blow is one more challenge of AUTH.
func (b blow) challenges() bool { return b.end == goOn && strings.HasPrefix(b.reply, "334") }

// refuses reports whether the command that the blow strikes is not executed.
func (b blow) refuses() bool {
	if b.reply == "" {
		return b.end != 0
	}
	return !positive(b.reply)
}

// meet applies the faults to an event, including their waits.
func (c *conn) meet(e Event) blow {
	if e.Step != Body { // the body's event is counted when the body begins
		c.events[e.Step]++
	}
	list := c.s.faultList()
	if len(list) == 0 {
		return blow{}
	}
	c.describe(&e)
	if e.From == "" {
		e.From = c.env.from
	}
	e.To = c.env.to[:len(c.env.to):len(c.env.to)]
	e.Pipelined = c.pipelined(&e)
	e.AuthLed = c.authLed
	var b blow
	done := false
	for _, h := range list {
		if !h.f.concerns(&e) {
			continue
		}
		if e.Step == Body {
			if slices.Contains(c.metBody, h) {
				continue
			}
			c.metBody = append(c.metBody, h)
		}
		if h.strikes(!done || h.f.observes()) && !done {
			b, done = c.suffer(h, e.Step)
		}
	}
	return b
}

// describe fills in the fields that all events of the connection have.
func (c *conn) describe(e *Event) {
	e.Addr, e.Conn = c.stats.Addr, c.stats.Conn
	e.N, e.Message = c.events[e.Step], c.events[Mail]
	e.Accepted, e.Recipients = c.messages, c.recipients
}

// pipelined reports whether more has arrived after e's command.
func (c *conn) pipelined(e *Event) bool {
	switch e.Step {
	case Connect, TLSHandshake, Body, Idle:
		return false
	case Bdat:
		return int64(c.br.Buffered()) > e.chunk
	}
	return c.br.Buffered() > 0 || c.wire.Unread() > 0
}

// suffer does what the fault says; done means that no other fault may strike.
func (c *conn) suffer(h *FaultHandle, at Step) (b blow, done bool) {
	f := &h.f
	c.note("fault at ", at.String())
	if f.Delay > 0 && at != Idle {
		c.is("delayed by a fault at " + at.String())
		if !c.pause(f.Delay) {
			return blow{end: lost}, true
		}
	}
	if f.Stall {
		c.is("stalled by a fault at " + at.String())
		if !c.stall(h, at) {
			return blow{end: lost}, true
		}
	}
	b.reply = f.Reply
	switch {
	case f.Abort:
		b.end = reset
	case f.Drop:
		b.end = drop
	}
	c.discard = c.discard || f.Discard
	return b, f.Stall || f.Reply != "" || b.end != 0 || f.Discard
}

// pause flushes and waits for d; it reports false if the connection was cut. A relay that is being closed does not wait.
func (c *conn) pause(d time.Duration) bool {
	c.bw.Flush()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.s.done:
	case <-c.cut:
		return false
	}
	return true
}

// stall waits until h is removed. It reports false if the connection ends first. It keeps reading until the buffer is full, to
// notice when the client closes.
func (c *conn) stall(h *FaultHandle, at Step) bool {
	c.bw.Flush()
	ahead := c.br
	if at == TLSHandshake {
		ahead = c.wire.in // the handshake will read from this buffer
	}
	read := make(chan error, 1)
	go func() { // ends when the buffer is full, the client has hung up, or the deadline set below
		_, err := ahead.Peek(ahead.Size())
		read <- err
	}()
	select {
	case err := <-read:
		if err != nil {
			return false
		}
		select {
		case <-h.removed:
			return true
		case <-c.s.done:
		case <-c.cut:
		}
		return false
	case <-h.removed:
		c.wire.SetReadDeadline(longAgo)
		<-read
		c.wire.SetReadDeadline(time.Time{})
		return true
	case <-c.s.done:
	case <-c.cut:
	}
	c.wire.SetReadDeadline(longAgo)
	<-read
	return false
}
