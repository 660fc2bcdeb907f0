package smtprelay

import (
	"context"
	"time"

	"github.com/smtprelay/smtprelay/internal/backoff"
	"github.com/smtprelay/smtprelay/internal/conn"
)

// Retry says how often one Send retries a message that the relay cannot have accepted: the connection was lost before the end of
// the message was sent, or the relay replied 421. A message that may have been accepted is never retried.
type Retry struct {
	_ [0]func() // not comparable, so that it may grow

	// MaxAttempts is the maximum number of attempts of one Send, including the first. 0 means 4. [NoLimit] means that only the
	// context and Timeouts.Outage end the Send. 1 means no retry, not even after a connection that cannot be opened.
	//
	// With any other value, two failures do not count: a connection that cannot be opened (Timeouts.Outage bounds that wait), and an
	// idle connection that the relay had closed when the message came.
	MaxAttempts int

	// MinBackoff and MaxBackoff set the wait before the next attempt: exponential backoff with full jitter, that is, a random
	// time between 0 and a limit that starts at MinBackoff, doubles with each attempt and is at most MaxBackoff. 0 means 500 ms
	// and 30 s. Neither may be negative.
	MinBackoff, MaxBackoff time.Duration

	// On4xx makes a Send also retry after a 4xx reply to MAIL, RCPT, DATA or the end of the message. By default the Send returns
	// such a reply, since the caller knows how long the message can wait. Greylisting needs minutes: raise both backoffs for it.
	On4xx bool
}

// withDefaults replaces zero by the default; MaxAttempts 0 means any number from here on.
func (r Retry) withDefaults() Retry {
	r.MaxAttempts = orDefault(r.MaxAttempts, 4)
	r.MinBackoff = orDefault(r.MinBackoff, 500*time.Millisecond)
	r.MaxBackoff = max(orDefault(r.MaxBackoff, 30*time.Second), r.MinBackoff)
	return r
}

// exhausted reports whether no attempt is left.
func (r Retry) exhausted(attempts int) bool { return r.MaxAttempts > 0 && attempts >= r.MaxAttempts }

// backoff returns how long to wait after consecutive failures.
func (r Retry) backoff(failures int) time.Duration {
	return backoff.Jittered(r.MinBackoff, r.MaxBackoff, failures)
}

// next is what to do after a transaction whose message was not accepted.
type next int

const (
	giveUp       next = iota // return the error to the caller
	retryLater               // retry after a backoff, if attempts are left
	retryNow                 // retry at once on another connection; the attempt does not count
	waitForSlot              // too many connections: retry on another connection when there is room; the attempt does not count
	waitForPace              // messages come too fast: retry first, at the relay's pace; the attempt does not count
	tryElsewhere             // retry at once on another connection, a few times per message; the attempt does not count
)

// next returns what to do after a transaction that ended in r with the error e. moved means that the message was tried on other
// connections often enough. The caller checks whether the body can be written again.
func (c Retry) next(r *conn.Result, e *Error, moved bool) next {
	switch {
	case e.Outcome != NotAccepted: // the relay may have accepted the message: only the caller can decide
		return giveUp
	case r.CtxErr != nil, r.BodyErr != nil, r.EndErr != nil: // the caller's context, Body or BeforeEnd has ended the transaction
		return giveUp
	case crowded(r, e):
		return waitForSlot
	case r.LedByAuth && r.Mail.Class() != 2:
		return retryNow // the relay does not accept commands after AUTH; from now on AUTH is sent alone
	case e.Reply.throttles(e.Op):
		return waitForPace
	case late(r, e):
		return retryNow // the connection was used up or dead before this message
	case r.Seq > 1 && e.Reply.says(tooManyMessages, e.Op):
		return retryNow // the connection has reached its limit of messages; another connection may take this one
	case !moved && r.Seq > 1 && e.Reply.endsSession(e.Op, r.Seq, r.Worked):
		return tryElsewhere
	}
	return c.nextByReply(r, e, moved)
}

// nextByReply returns what to do after a refusal or a loss that is about the message or the relay as a whole.
func (c Retry) nextByReply(r *conn.Result, e *Error, moved bool) next {
	switch {
	case e.Reply.Code == 0, !r.Begun, e.Reply.Code == 421 && e.Op != OpAuth:
		return retryLater // the relay is closing or gone, and has not accepted the message (RFC 5321, 3.8)
	case e.Op == OpRset, e.Reply.Code < 400 && r.Overlapped:
		return retryNow // the relay does not know RSET, or has discarded commands after a final dot; the profile now avoids both
	case e.Reply.Code < 400:
		return retryLater // not a refusal: the relay is out of step
	case e.Op == OpMail && e.Reply.Code == 503 && r.Seq > 1 && !moved:
		return tryElsewhere // our idea of the connection's state was wrong
	case e.Temporary() && c.On4xx:
		return retryLater
	}
	return giveUp // when in doubt, tell the caller
}

// crowded reports whether the relay has replied that there are too many connections. Microsoft 365 replies 432 ("Concurrent
// connections limit exceeded"). A reply to a pipelined AUTH or to the MAIL after it is recognized by its text, so that it does
// not count as a refusal of the credentials.
func crowded(r *conn.Result, e *Error) bool {
	if e.Reply.Code == 432 {
		return true
	}
	return r.LedByAuth && (publicReply(r.Auth).says(saysTooManyConns, OpAuth) || publicReply(r.Mail).says(saysTooManyConns, OpMail))
}

// late reports whether the connection ended before the relay had replied to this transaction's MAIL, although it had worked for
// an earlier message. Each such loss follows a completed transaction, which bounds the number of retries.
func late(r *conn.Result, e *Error) bool {
	if r.Used <= 1 && !r.AfterIdle || r.Mail.Class() == 2 {
		return false
	}
	if !r.Begun {
		return true // the connection ended before the first command, whatever the relay has replied
	}
	mail := publicReply(r.Mail)
	return e.Reply.Code == 0 || e.Reply.Code == 421 || mail.says(idleTooLong, OpMail) || mail.says(tooManyMessages, OpMail)
}

// sleep waits for d, or until ctx ends or closed is closed.
func sleep(ctx context.Context, d time.Duration, closed <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return conn.ContextError(ctx)
	case <-closed:
		return ErrClosed
	}
}
