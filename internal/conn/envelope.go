package conn

import (
	"errors"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// The commands of a transaction that precede the body, and the wait for their replies.

// authSilence limits the wait for the reply to a MAIL that was pipelined after AUTH, counted from the reply to AUTH. Some relays
// discard what follows AUTH; the message then goes to another connection, on which AUTH is sent alone.
const authSilence = 2 * time.Second

// ledAuthSilence limits the wait for the reply to an AUTH with commands pipelined after it. No part of the body was sent, so a
// short limit is safe.
const ledAuthSilence = 10 * time.Second

// envelope writes the commands of the envelope, and waits for each reply if commands are not pipelined. It reports whether the
// transaction can continue.
func (t *Transaction) envelope() bool {
	c := t.c
	rset := t.begin()
	command := c.o.Timeouts.Command
	mailLimit := command
	if first := c.o.Timeouts.First; t.result.Seq == 1 && first > 0 && (mailLimit == 0 || first < mailLimit) {
		mailLimit = first
	}
	if c.pendingAuth != nil {
		t.result.LedByAuth = true
		if mailLimit == 0 || mailLimit > authSilence {
			mailLimit = authSilence
		}
		if !t.writeAuth() {
			return false
		}
	}
	if rset {
		x := exchange{op: StepRset, limit: command, first: t.result.Overlapped}
		if t.result.Overlapped && (!t.result.Chunked || t.held) {
			x.limit = c.o.Timeouts.Overlap
		}
		if !t.reset(x) {
			return false
		}
	}
	c.line = wire.AppendMail(c.line[:0], t.m.From, &t.mail)
	if !t.askLine(exchange{op: StepMail, limit: mailLimit}) {
		return false
	}
	for i := range t.result.Rcpt {
		if !c.pipelining() && t.result.MailRefused() {
			break
		}
		addr, rcpt := t.m.recipient(i)
		c.line = wire.AppendRcpt(c.line[:0], addr, &rcpt, t.mail.UTF8)
		if !t.askLine(exchange{op: StepRcpt, rcpt: i, limit: command}) {
			return false
		}
	}
	return true
}

// begin counts the transaction on the connection and reports whether it must start with RSET.
func (t *Transaction) begin() (rset bool) {
	c := t.c
	c.mu.Lock()
	defer c.mu.Unlock()
	rset = c.open
	t.result.Overlapped = c.pending > 0
	t.result.AfterIdle = !t.result.Overlapped && time.Since(later(c.born, c.heard)) >= LongIdle
	// A refused chunk leaves the envelope open (RFC 3030, 2); a refused final dot does not.
	t.clearing, c.unended = rset && (c.unended || t.result.Chunked && !t.result.Overlapped), true
	t.held = t.result.Chunked && (t.result.AfterIdle || t.mustHoldLocked())
	if c.failed++; t.result.Overlapped || !rset {
		c.failed = 0
	}
	c.open = true
	c.used++
	t.result.Seq = c.used
	if c.limit > 0 && c.used >= c.limit || c.failed >= maxFailed {
		c.retireLocked(Full)
	}
	if t.result.Overlapped {
		c.o.Profile.Overlapped()
	}
	return rset
}

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// reset writes the command that clears an open envelope.
func (t *Transaction) reset(x exchange) bool {
	if t.result.Overlapped || !t.c.o.Profile.ResetsByEHLO() {
		return t.ask(x, "RSET")
	}
	// EHLO resets too (RFC 5321, 4.1.4). It must be the last command of a pipelined group (RFC 2920, 3.1).
	return t.ask(x, t.c.hello) && t.send() && t.awaitEnvelope()
}

// writeAuth writes the AUTH command that Open left for the first transaction.
func (t *Transaction) writeAuth() bool {
	c := t.c
	c.line, c.pendingAuth = append(c.line[:0], c.pendingAuth...), nil
	limit := c.o.openingLimit()
	if t.result.LedByAuth && (limit == 0 || limit > ledAuthSilence) {
		limit = ledAuthSilence
	}
	if !t.expect(exchange{op: StepAuth, limit: limit, end: c.position() + int64(len(c.line))}) {
		return false
	}
	c.traceCommand(t.ctx, "AUTH PLAIN "+scrub.Redacted)
	_, err := c.out.Write(c.line)
	clear(c.line)
	return err == nil || t.explained()
}

func (t *Transaction) ask(x exchange, command string) bool {
	t.c.line = append(append(t.c.line[:0], command...), "\r\n"...)
	return t.askLine(x)
}

// askLine writes the command in c.line. If commands are not pipelined, it waits for the reply.
func (t *Transaction) askLine(x exchange) bool {
	c := t.c
	x.follows = t.result.Overlapped && (!t.result.Chunked || t.held)
	if (t.result.AfterIdle && t.asked == 0 || x.follows) && (x.limit == 0 || x.limit > impatient) {
		x.limit = impatient // the message has not left: it is safe to give up
	}
	x.end = c.position() + int64(len(c.line))
	if !t.expect(x) {
		return false
	}
	if c.trace.Command != nil {
		c.trace.Command(t.ctx, strings.TrimSuffix(string(c.line), "\r\n"))
	}
	if _, err := c.out.Write(c.line); err != nil {
		return t.explained()
	}
	if c.pipelining() {
		return true
	}
	if c.Flush() != nil {
		return t.explained()
	}
	return t.awaitEnvelope()
}

// askData writes DATA together with the envelope, unless DATA must wait for the replies.
func (t *Transaction) askData() bool {
	if !t.c.pipelining() || t.waitsForRcpts() {
		return true
	}
	return t.ask(exchange{op: StepData, limit: t.c.o.Timeouts.Data}, "DATA")
}

// startData sends DATA if askData has not, and reports whether the relay is ready for the body. All replies to the envelope have
// arrived.
func (t *Transaction) startData() bool {
	if t.dataIsDue() && (!t.ask(exchange{op: StepData, limit: t.c.o.Timeouts.Data}, "DATA") || !t.sendNow() || !t.awaitEnvelope()) {
		return false
	}
	switch {
	case t.result.Data.Class() != 3:
		return false
	case t.result.MailRefused() || t.clearing && t.result.Accepted() == 0:
		// The relay has refused our envelope but replied 354, so it may have kept an earlier envelope. A lone final dot would
		// send an empty message to the recipients of that envelope.
		t.c.fail(&ReplyError{Step: StepData, Reply: t.result.Data})
		return false
	case t.result.Accepted() == 0:
		t.loneDot()
		return false
	}
	return true
}

// dataIsDue reports whether DATA, or a held body in chunks, is to be sent now: the relay has accepted at least one recipient, or
// with AllOrNothing all recipients.
func (t *Transaction) dataIsDue() bool {
	if t.result.Data.Code != 0 || t.result.AuthRefused() || t.result.MailRefused() {
		return false
	}
	accepted := t.result.Accepted()
	if t.m.AllOrNothing {
		return accepted == len(t.result.Rcpt)
	}
	return accepted > 0
}

// loneDot ends a DATA for which no recipient was accepted (RFC 2920, 3.1). The message has no recipients, whatever the relay
// replies, so loneDot does not wait for the reply.
func (t *Transaction) loneDot() {
	if !t.c.expect(exchange{op: StepFinalDot, final: true, left: true, end: t.c.position() + int64(len(".\r\n")), limit: t.c.o.Timeouts.FinalReply, tx: &Transaction{c: t.c, ctx: t.ctx, result: Result{Seq: -1}}}) {
		return
	}
	t.c.out.WriteString(".\r\n")
	t.c.traceCommand(t.ctx, ".")
	t.c.Flush()
}

// awaitEnvelope waits until every command has its reply, and reports whether the connection still works.
//
// If the relay does not answer the previous message's final dot within stallLimit, and another connection is free, awaitEnvelope
// fails this connection. No part of our body was sent, so the message can go to the other connection.
func (t *Transaction) awaitEnvelope() bool {
	c := t.c
	var began time.Time
	if t.result.Overlapped {
		began = time.Now()
		t.stall.Reset(stallLimit)
		defer t.stall.Stop()
	}
	for woken := false; ; woken = true {
		c.mu.Lock()
		lost, complete, silent := c.phase >= draining, t.asked == t.answered, t.answered == 0
		forNobody := !c.waiting.empty() && c.waiting.oldest().left
		c.mu.Unlock()
		if lost || complete {
			return !lost
		}
		if woken && t.result.Overlapped && time.Since(began) >= stallLimit {
			if silent && (forNobody || c.owner.Elsewhere()) {
				c.fail(errStalled)
				return false
			}
			began = time.Now()
			t.stall.Reset(stallLimit)
		}
		select {
		case <-t.signal:
		case <-c.lost:
		}
	}
}

const (
	LongIdle   = 10 * time.Second // after this long without traffic, a firewall may have dropped the connection silently
	impatient  = 30 * time.Second // limit for the first reply after LongIdle, and for replies to commands that the relay may have discarded
	stallLimit = 10 * time.Second // how long a message waits after an unanswered final dot
)

var errStalled = &GivenUpError{errors.New("the relay does not reply to the previous message")}

// overlapRefused reports whether the transaction must start again because the relay has refused every command after the final
// dot (503: "pipelined after end of DATA"). A restart is safe: nothing was accepted, replies are in step, and the connection's
// limit allows another MAIL. If TCP delivered only RSET together with the dot, the relay has accepted the other commands, and
// the transaction goes on.
func (t *Transaction) overlapRefused() bool {
	if !t.result.Overlapped || t.result.Rset.Code != 503 {
		return false
	}
	c := t.c
	c.o.Profile.OverlapFailed()
	c.mu.Lock()
	defer c.mu.Unlock()
	return t.result.Mail.Code == 503 && t.result.Data.Class() != 3 && (c.limit == 0 || c.used < c.limit)
}

// repeat resets t so that it can start again on the same connection.
func (t *Transaction) repeat() {
	c := t.c
	c.mu.Lock()
	defer c.mu.Unlock()
	t.asked, t.answered = 0, 0
	clear(t.result.Rcpt)
	t.result.Replies = Replies{Rcpt: t.result.Rcpt}
}
