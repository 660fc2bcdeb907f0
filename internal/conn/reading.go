package conn

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// The read loop of a connection.

// ReadLoop reads replies until the connection has ended. No other goroutine reads from the connection.
func (c *Conn) ReadLoop() {
	var err error
	for more := true; more; {
		var r wire.Reply
		if r, _, err = c.readReply(false); err != nil {
			break
		}
		more = c.deliver(r)
	}
	c.mu.Lock()
	c.failLocked(c.lossLocked(err))
	c.mu.Unlock()
	c.raw.interrupt()
	c.mu.Lock()
	for c.attempted != c.written { // a write is in progress: wait until we know how much of it was sent
		c.wrote.Wait()
	}
	wait := c.o.Timeouts.Quit
	waited := c.quitting && (c.waiting.empty() || c.waiting.oldest().op == StepQuit)
	switch {
	case c.ending.killed:
		wait = 0
	case waited && c.writeErr == nil && isOver(err) && c.deadline != longAgo:
		wait -= c.o.Timeouts.untilFIN()
	}
	c.phase, c.ending.left421 = closing, c.ending.said421 && errors.Is(err, io.EOF)
	c.mu.Unlock()
	close(c.done)
	c.owner.Changed(false)

	// close_notify ends TLS, not the TCP connection below it.
	if _, onTLS := c.conn.(*tls.Conn); ClosedByPeer(err) && !onTLS {
		c.raw.Close()
	} else {
		c.raw.hangUp(wait)
	}
	c.owner.Closed()
}

// deliver hands r to the oldest outstanding command and reports whether to continue reading.
func (c *Conn) deliver(r wire.Reply) (more bool) {
	c.traceReply(r)
	c.mu.Lock()
	if c.earlyLocked(r) {
		c.failLocked(&UnexpectedReply{Reply: r})
		c.mu.Unlock()
		return false
	}
	now := time.Now()
	c.heard = now
	x := c.waiting.take()
	c.answered = max(c.answered, x.end)
	c.boundUnackedLocked()
	more = c.handleLocked(x, r, now)
	c.mu.Unlock()
	if x.op == StepQuit && r.Class() == 2 {
		c.endTLS()
	}
	if x.final {
		if more {
			c.owner.Changed(true)
		}
		// After Changed, so that a sender with another message finds this connection idle and does not open a new one.
		c.mu.Lock()
		x.tx.notified = true
		x.tx.wake()
		c.mu.Unlock()
	}
	return more
}

// handleLocked applies r, the reply to x that arrived at now, to the connection and the transaction, and reports whether to
// continue reading.
func (c *Conn) handleLocked(x exchange, r wire.Reply, now time.Time) (more bool) {
	c.learnLimit(x, r)
	c.decided = c.decided || decides(x, r)
	if r.Code == 421 && x.op != StepQuit {
		// The relay is closing the connection. It may still answer what it has received.
		c.ending.said421 = true
		c.hurryLocked(c.o.Timeouts.Quit)
		c.failLocked(&ReplyError{Step: x.op, Reply: r})
	}
	switch {
	case x.tx != nil:
		if x.final && r.Code == 421 && c.replies.HadYes() {
			x.tx.result.Contradicted = true // a 2xx that turned into a 421 before its last line
		}
		x.tx.replyLocked(x, r)
	case x.first && r.Code == 503:
		c.o.Profile.OverlapFailed()
	}
	stays := false // the relay refused QUIT: send FIN now
	if x.op == StepQuit {
		stays = r.Class() != 2
		c.hurryLocked(c.o.Timeouts.untilFIN()) // only the relay's close is outstanding
	}
	if x.final {
		c.pending--
	}
	if c.waiting.empty() {
		c.peekLocked(x, r)
	}
	c.raw.hasten = c.isPartLocked(x)
	c.armAtLocked(now)
	return !c.ending.outOfStep && !stays && (c.phase < draining || c.dueLocked())
}

// isPartLocked reports whether the relay owes us more replies after the one to x. If the relay writes the next reply separately,
// its kernel may delay it until we acknowledge this one. With chunks, only replies to the same message and to QUIT count:
// replies to other messages are nearly always outstanding, and the data we send carries the acknowledgement.
func (c *Conn) isPartLocked(x exchange) bool {
	if c.waiting.empty() {
		return false
	}
	next := c.waiting.oldest()
	return next.end <= c.attempted && (next.tx == x.tx || next.tx == nil || !c.chunked)
}

// decides reports whether r, the reply to x, accepts or refuses a message on its merits, which shows that the relay works.
// Commands after a refused MAIL do not count: they fail because of MAIL. A refused MAIL counts only after an earlier transaction
// on the connection: some relays refuse every client in MAIL and close the connection.
func decides(x exchange, r wire.Reply) bool {
	switch {
	case r.Code == 421 || r.Code == 432:
		return false
	case x.final:
		return true
	case r.Class() < 4:
		return false
	case x.op == StepMail:
		return r.Class() == 5 && r.Code != 503 && r.Code != 530 && x.tx.result.Seq > 1
	}
	return (x.op == StepRcpt || x.op == StepData) && !x.tx.result.MailRefused()
}

// learnLimit records in the profile what r, the reply to x, says about the relay's limit of transactions on a connection.
func (c *Conn) learnLimit(x exchange, r wire.Reply) {
	switch mail := x.op == StepMail; {
	case mail && r.Class() == 2:
		c.o.Profile.SessionGoesOn(x.tx.result.Seq)
	case (mail || x.op == StepRset) && x.tx.result.Seq > 1 && (r.Code == 421 || mail && c.o.Profile.EndsSession(x.op, r, x.tx.result.Seq, c.decided)):
		c.o.Profile.SessionFull(x.tx.result.Seq-1, c.born, r)
	}
}

// peekLocked checks whether an extra reply arrived together with r, the reply to x. No command is outstanding.
func (c *Conn) peekLocked(x exchange, r wire.Reply) {
	switch next := c.replies.Peek(); {
	case next == 0:
	case x.final && next/100 != r.Class() && next != 421 && next != 221:
		x.tx.result.Contradicted = true
	case !x.final && next < 400:
		c.failLocked(errExtraReply) // before a transaction acts on replies that may belong to other commands
	}
}

// earlyLocked reports whether r arrived before the command it would answer was written. Such a reply is an extra one, and every
// later reply would be matched with the wrong command. A refusal may be early: a relay may refuse a message before it has read
// the end.
func (c *Conn) earlyLocked(r wire.Reply) bool {
	return c.waiting.empty() || r.Class() < 4 && c.waiting.oldest().end > c.attempted
}

// errExtraReply ends a connection on which the relay has sent more replies than it got commands.
var errExtraReply = errors.New("the relay sent an extra reply")

// readReply reads a reply; long raises the maximum length, for replies that carry data. Credentials that the relay repeats are
// removed from r and err, but not from raw.
func (c *Conn) readReply(long bool) (r wire.Reply, raw string, err error) {
	read := c.replies.ReadReply
	if long {
		read = c.replies.ReadLong
	}
	if r, err = read(); err != nil {
		if m, ok := errors.AsType[*wire.MalformedError](err); ok {
			err = &wire.MalformedError{Line: c.said.Scrub(m.Line)}
		}
		return r, "", err
	}
	raw = r.Text
	r.Text = c.said.Scrub(raw)
	return r, raw, nil
}

// traceReply calls Trace.Reply, before the reply has any effect.
func (c *Conn) traceReply(r wire.Reply) {
	if c.trace.Reply == nil {
		return
	}
	var x exchange
	ctx := context.Background()
	c.mu.Lock()
	if !c.waiting.empty() {
		if x = *c.waiting.oldest(); x.tx != nil {
			ctx = x.tx.ctx
		}
	}
	c.mu.Unlock()
	if x.final {
		x.op = StepFinalDot // also for BDAT LAST
	}
	c.trace.Reply(ctx, x.op, r)
}

// armLocked sets the read deadline to that of the oldest outstanding exchange.
func (c *Conn) armLocked() { c.armAtLocked(time.Time{}) }

// armAtLocked is armLocked at the time now, if that is known.
func (c *Conn) armAtLocked(now time.Time) {
	if c.phase == closing {
		return
	}
	var at time.Time
	switch {
	case c.ending.cause != nil && !c.dueLocked():
		at = longAgo
	case !c.waiting.empty():
		x := c.waiting.oldest()
		limit := x.limit
		if x.final && c.leftLocked() && (limit == 0 || limit > stallLimit) {
			limit = stallLimit // no transaction waits for this reply: do not let it block the connection for long
		}
		if limit > 0 && x.end <= c.written {
			if now.IsZero() {
				now = time.Now()
			}
			at = now.Add(limit)
		}
	}
	if !c.closeBy.IsZero() && (at.IsZero() || c.closeBy.Before(at)) {
		at = c.closeBy
	}
	c.deadline = at
	c.raw.SetReadDeadline(at)
}

// dueLocked reports whether a transaction waits for a final reply that a failed connection may still deliver, because the end of
// its message was sent in full.
func (c *Conn) dueLocked() bool {
	return slices.ContainsFunc(c.waiting.all(), func(x exchange) bool { return x.final && !x.left && x.end <= c.attempted })
}

// leftLocked reports whether no transaction waits for an outstanding final reply.
func (c *Conn) leftLocked() bool {
	return !slices.ContainsFunc(c.waiting.all(), func(x exchange) bool { return x.final && !x.left })
}

// leave records that t no longer waits for its final reply.
func (c *Conn) leave(t *Transaction) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.waiting.all()
	for i := range all {
		if all[i].tx == t {
			all[i].left = true
		}
	}
	c.armLocked()
}

// hurryLocked stops reading after d at the latest.
func (c *Conn) hurryLocked(d time.Duration) {
	if by := time.Now().Add(d); c.closeBy.IsZero() || by.Before(c.closeBy) {
		c.closeBy = by
	}
}

// lossLocked turns err, which ended the read loop, into the reason why the connection was lost.
func (c *Conn) lossLocked(err error) error {
	if c.ending.cause == nil && !c.waiting.empty() {
		if x := c.waiting.oldest(); x.tx != nil && x.tx.result.LedByAuth && x.op != StepRcpt && x.op != StepData {
			c.ending.ledByAuth = true
			c.o.Profile.AuthFollowedFailed(wire.Reply{}) // it hangs up, or is silent, when commands follow AUTH
		}
	}
	if c.writeErr != nil && (err == nil || IsTimeout(err) || ClosedByPeer(err)) {
		return c.writeErr // the failed write is the cause, the failed read a consequence
	}
	if err == nil || c.waiting.empty() {
		return err
	}
	x := c.waiting.oldest()
	if !isOver(err) {
		return err
	}
	if (x.first || x.follows) && (c.ending.cause == nil || time.Since(c.heard) >= tellingSilence) {
		// The relay discarded what followed the final dot; see Profile.OverlapFailed.
		c.o.Profile.OverlapFailed()
	}
	return &TimeoutError{Step: x.op, After: x.limit}
}

// tellingSilence is how long overlapped commands must have gone unanswered before we conclude that the relay discards them, if the
// caller's context ended the wait. A context that ends earlier says nothing about the relay.
const tellingSilence = time.Second
