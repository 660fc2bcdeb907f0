package conn

import (
	"errors"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// The commands of a transaction up to where its body may follow, and the wait for their replies.

// authSilence is how long a relay may take for the reply to MAIL, once it has answered the AUTH in front of it. Some throw away
// what follows AUTH; the message goes to another connection then, on which AUTH goes alone.
const authSilence = 2 * time.Second

// envelope writes the commands of the envelope, and awaits each one's reply if they are not pipelined. It reports whether
// the conversation goes on.
func (t *Transaction) envelope() bool {
	c := t.c
	rset := t.begin()
	command := c.o.Timeouts.Command
	mailLimit := command
	if c.pendingAuth != nil {
		t.ledByAuth = true
		if mailLimit == 0 || mailLimit > authSilence {
			mailLimit = authSilence
		}
		if !t.writeAuth() {
			return false
		}
	}
	if rset {
		x := exchange{op: StepRset, limit: command, first: t.overlapped}
		if t.overlapped && (t.byData || t.held) { // the message has not left: it is safe to be impatient
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
	for i := range t.replies.Rcpt {
		if !c.pipelining() && t.replies.MailRefused() {
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

// begin notes in the connection that a transaction begins, and tells whether RSET must lead it.
func (t *Transaction) begin() (rset bool) {
	c := t.c
	c.mu.Lock()
	defer c.mu.Unlock()
	rset = c.open
	t.overlapped = c.pending > 0
	t.afterIdle = !t.overlapped && time.Since(later(c.born, c.heard)) >= longIdle
	// A refused chunk leaves the envelope where it was (RFC 3030, 2), unlike a refused final dot.
	t.clearing, c.unended = rset && (c.unended || !t.byData && !t.overlapped), true
	t.held = !t.byData && (t.afterIdle || t.mustHoldLocked())
	if c.failed++; t.overlapped || !rset {
		c.failed = 0
	}
	c.open = true
	c.used++
	t.seq = c.used
	if c.limit > 0 && c.used >= c.limit || c.failed >= maxFailed {
		c.retireLocked(Full)
	}
	if t.overlapped {
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

// reset clears an envelope away.
func (t *Transaction) reset(x exchange) bool {
	if t.overlapped || !t.c.o.Profile.ResetsByEHLO() {
		return t.ask(x, "RSET")
	}
	// RFC 5321, 4.1.4. EHLO is the last of its group (RFC 2920, 3.1).
	return t.ask(x, t.c.hello) && t.send() && t.awaitEnvelope()
}

// writeAuth writes the AUTH that was held back.
func (t *Transaction) writeAuth() bool {
	c := t.c
	c.line, c.pendingAuth = append(c.line[:0], c.pendingAuth...), nil
	if !t.expect(exchange{op: StepAuth, limit: c.o.openingLimit(), end: c.position() + int64(len(c.line))}) {
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

// askLine writes the command in c.line. Where commands are not pipelined it awaits the reply.
func (t *Transaction) askLine(x exchange) bool {
	c := t.c
	if t.afterIdle && t.asked == 0 && (x.limit == 0 || x.limit > idleReply) {
		x.limit = idleReply
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

// askData has DATA ride with the envelope, unless it depends on the replies whether anything is to be sent.
func (t *Transaction) askData() bool {
	if !t.c.pipelining() || t.waitsForRcpts() {
		return true
	}
	return t.ask(exchange{op: StepData, limit: t.c.o.Timeouts.Data}, "DATA")
}

// startData says DATA if that was held back and is due, and reports whether the body is to follow. All replies to the envelope
// are in.
func (t *Transaction) startData() bool {
	if t.dataIsDue() && (!t.ask(exchange{op: StepData, limit: t.c.o.Timeouts.Data}, "DATA") || !t.sendNow() || !t.awaitEnvelope()) {
		return false
	}
	switch {
	case t.replies.Data.Class() != 3:
		return false
	case t.replies.MailRefused() || t.clearing && t.replies.Accepted() == 0:
		// The relay waits for a message although it has refused this one's envelope: it may have kept another one. Not even
		// the final dot may leave, which would send an empty message to whoever that is for.
		t.c.fail(&ReplyError{Step: StepData, Reply: t.replies.Data})
		return false
	case t.replies.Accepted() == 0:
		t.loneDot()
		return false
	}
	return true
}

// dataIsDue reports whether DATA, or a body in chunks, was held back and is due: the relay has accepted some recipients, or all of them if
// AllOrNothing says so.
func (t *Transaction) dataIsDue() bool {
	if t.replies.Data.Code != 0 || t.replies.AuthRefused() || t.replies.MailRefused() {
		return false
	}
	accepted := t.replies.Accepted()
	if t.m.AllOrNothing {
		return accepted == len(t.replies.Rcpt)
	}
	return accepted > 0
}

// loneDot ends a DATA for which no recipient was accepted (RFC 2920, 3.1). The relay sends nothing then, whatever it
// answers, so the answer is not awaited here.
func (t *Transaction) loneDot() {
	if !t.c.expect(exchange{op: StepFinalDot, final: true, end: t.c.position() + int64(len(".\r\n")), limit: t.c.o.Timeouts.FinalReply, tx: &Transaction{c: t.c, ctx: t.ctx, seq: -1}}) {
		return
	}
	t.c.out.WriteString(".\r\n")
	t.c.traceCommand(t.ctx, ".")
	t.c.Flush()
}

// awaitEnvelope waits until each command has its reply. It reports whether the connection can go on.
//
// Where it waits behind the final dot of another message, and the relay says nothing to that, the message goes to another
// connection if there is room: nothing of it has left.
func (t *Transaction) awaitEnvelope() bool {
	c := t.c
	var stalled <-chan time.Time
	if t.overlapped {
		if c.stall == nil {
			c.stall = time.NewTimer(stallLimit)
		} else {
			c.stall.Reset(stallLimit)
		}
		stalled = c.stall.C
		defer c.stall.Stop()
	}
	for {
		c.mu.Lock()
		lost, complete, silent := c.phase >= draining, t.asked == t.answered, t.answered == 0
		c.mu.Unlock()
		if lost || complete {
			return !lost
		}
		select {
		case <-t.signal:
		case <-c.lost:
		case <-stalled:
			if silent && c.owner.Elsewhere() {
				c.fail(errStalled)
			}
			c.stall.Reset(stallLimit)
		}
	}
}

const (
	longIdle   = 10 * time.Second // of a connection: from then on it may have been cut without a word
	idleReply  = 30 * time.Second // for the first reply on such a connection
	stallLimit = 10 * time.Second // how long a message waits behind another one's final dot before it goes elsewhere
)

var errStalled = &GivenUpError{errors.New("the relay does not answer the message before")}

// overlapRefused reports whether the relay does not take commands behind a final dot and has said so, once for each
// (503: "pipelined after end of DATA"), so that the transaction is to be begun again: nothing was accepted, the connection is
// in step, and it has room for one MAIL more. Where TCP has put only RSET together with the dot, the relay has taken the
// rest, and that is the transaction.
func (t *Transaction) overlapRefused() bool {
	if !t.overlapped || t.replies.Rset.Code != 503 {
		return false
	}
	c := t.c
	c.o.Profile.OverlapFailed()
	c.mu.Lock()
	defer c.mu.Unlock()
	return t.replies.Mail.Code == 503 && t.replies.Data.Class() != 3 && (c.limit == 0 || c.used < c.limit)
}

// repeat makes t as new, to be begun again on the same connection.
func (t *Transaction) repeat() {
	c := t.c
	c.mu.Lock()
	defer c.mu.Unlock()
	t.asked, t.answered = 0, 0
	clear(t.replies.Rcpt)
	t.replies = Replies{Rcpt: t.replies.Rcpt}
}
