package conn

import "github.com/smtprelay/smtprelay/internal/wire"

// The effect of each reply on its transaction and on the connection.

// replyLocked handles r, the reply to x. c.mu is held.
func (t *Transaction) replyLocked(x exchange, r wire.Reply) {
	c := t.c
	if r.Code == 432 {
		c.retireFaultLocked(&ReplyError{Step: x.op, Reply: r}) // the relay has too many connections from us
	}
	if x.final {
		t.finalLocked(x, r)
		return
	}
	t.answered++
	t.wake()
	switch x.op {
	case StepAuth:
		t.authLocked(r)
	case StepRset:
		t.rsetLocked(x, r)
	case StepMail:
		t.mailLocked(r)
	case StepRcpt:
		t.result.Rcpt[x.rcpt] = r
		t.endsSessionLocked(x.op, r)
	case StepData:
		t.result.Data = r
		t.endsSessionLocked(x.op, r)
	case StepBdat:
		if t.result.Data.Class() == 2 && r.Class() >= 4 {
			c.retireLocked(Full) // the relay has accepted a part of the body and will not get the rest
		}
		if t.result.Data.Class() < 4 { // keep the first refusal: the later ones are consequences
			t.result.Data = r
			t.endsSessionLocked(StepData, r)
		}
	}
	positive := 2
	if x.op == StepData {
		positive = 3
	}
	if r.Class() < 4 && r.Class() != positive { // not a possible reply to this command
		if t.result.Overlapped {
			c.o.Profile.OverlapFailed()
		}
		c.stepLostLocked(&ReplyError{Step: x.op, Reply: r})
	}
}

// finalLocked handles the final reply. deliver wakes the transaction after it has called Owner.Changed.
func (t *Transaction) finalLocked(x exchange, r wire.Reply) {
	c := t.c
	t.result.Final = r
	switch r.Class() {
	case 2:
		if t.result.After421 = c.ending.said421; t.result.Seq == c.used {
			c.open = false
		}
	case 3:
		c.stepLostLocked(&ReplyError{Step: x.op, Reply: r})
	}
}

// authLocked handles the reply to AUTH.
func (t *Transaction) authLocked(r wire.Reply) {
	c := t.c
	t.result.Auth = r
	c.o.Profile.AuthAnswered(c.authMark, r, t.result.LedByAuth)
	if r.Class() == 2 {
		return
	}
	c.ending.auth = r
	if t.result.LedByAuth {
		c.ending.ledByAuth = true
		c.o.Profile.AuthFollowedFailed(r)
	}
	c.failLocked(&AuthError{r})
}

// rsetLocked handles the reply to RSET.
func (t *Transaction) rsetLocked(x exchange, r wire.Reply) {
	t.result.Rset = r
	if r.Class() == 2 || x.first && r.Code == 503 && !t.result.Chunked {
		return // for 503 see overlapRefused
	}
	if !x.first && (r.Code == 500 || r.Code == 502) {
		t.c.o.Profile.RsetFailed()
	}
	if x.first && r.Code != 421 { // 421 is about the connection, not about the overlap
		t.c.o.Profile.OverlapFailed()
	}
	t.c.failLocked(&ReplyError{Step: x.op, Reply: r})
}

// mailLocked handles the reply to MAIL.
func (t *Transaction) mailLocked(r wire.Reply) {
	c := t.c
	t.result.Mail, t.result.Worked = r, c.decided
	switch {
	case t.result.LedByAuth && r.Class() != 2 && c.o.Profile.AuthFollowedFailed(r):
		c.ending.ledByAuth = true
		c.retireFaultLocked(&ReplyError{Step: StepMail, Reply: r})
	case c.o.Profile.EndsSession(StepMail, r, t.result.Seq, t.result.Worked):
		c.retireLocked(Full)
	case r.Code == 503 && t.result.Rset.Code != 503, r.Code == 530:
		c.retireFaultLocked(&ReplyError{Step: StepMail, Reply: r}) // the relay and we disagree about the state of the connection
	}
}

// endsSessionLocked retires the connection if r is about the connection and not about the message.
func (t *Transaction) endsSessionLocked(op Step, r wire.Reply) {
	if r.Class() >= 4 && t.c.o.Profile.EndsSession(op, r, t.result.Seq, t.result.Worked) {
		t.c.retireLocked(Full)
	}
}

func (t *Transaction) wake() { notify(t.signal) }

// notify sends to signal, unless a signal is already waiting there.
func notify(signal chan<- struct{}) {
	select {
	case signal <- struct{}{}:
	default:
	}
}
