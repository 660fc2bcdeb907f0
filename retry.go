package smtprelay

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// Retry says how often one Send tries a message again where the relay cannot have accepted it: the connection was lost before the end of
// the message was sent, or the relay replied 421. A message that may have been accepted is never tried again.
type Retry struct {
	_ [0]func() // not comparable, so that it may grow

	// MaxAttempts is the largest number of tries of one Send, the first one included. 0 means 4. [NoLimit] means that only the context
	// and Timeouts.Outage end the Send. 1 means that nothing is tried again, a connection that cannot be opened included.
	//
	// With any other value, two failures do not count: a connection that cannot be opened (Timeouts.Outage bounds that wait), and an
	// idle connection that the relay had closed when the message came.
	MaxAttempts int

	// MinBackoff and MaxBackoff set the wait before the next try: exponential backoff with full jitter, that is, a random time
	// between 0 and a limit that starts at MinBackoff, doubles with each try and is at most MaxBackoff. 0 means 500 ms and 30 s.
	// Neither may be negative.
	MinBackoff, MaxBackoff time.Duration

	// On4xx makes a Send also try again after a 4xx reply to MAIL, RCPT, DATA or the end of the message. By default the Send returns
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

// exhausted reports whether there is no try left after so many.
func (r Retry) exhausted(attempts int) bool { return r.MaxAttempts > 0 && attempts >= r.MaxAttempts }

// backoff is how long to wait after so many failures in a row: a random part of a time that doubles, so that many who fail
// together do not come back together.
func (r Retry) backoff(failures int) time.Duration {
	most := r.MaxBackoff
	if shift := failures - 1; r.MinBackoff < most>>min(shift, 63) { // the other way round it overflows after many failures
		most = r.MinBackoff << shift
	}
	return rand.N(most) + 1
}

// next is what follows a transaction that did not end with its message accepted.
type next int

const (
	giveUp       next = iota // the caller is told
	retryLater               // another try after a wait, as long as there are attempts left
	retryNow                 // at once and uncounted, on another connection
	waitForSlot              // on another connection, once there is room: the relay says that there are too many
	waitForPace              // at the relay's pace, before all others, and uncounted: it says that messages come too fast
	tryElsewhere             // at once and uncounted on another connection, but once for each message
)

// next tells what follows a transaction that ended in r with the error e. moved is set where the message was tried elsewhere
// already. Whether the body can be written again is for the caller to see.
func (c Retry) next(r *conn.Result, e *Error, moved bool) next {
	switch {
	case e.Outcome != NotAccepted: // the relay may have accepted it: only the caller can decide
		return giveUp
	case r.CtxErr != nil, r.BodyErr != nil, r.EndErr != nil: // the caller has ended it: the context, the message or BeforeEnd
		return giveUp
	case crowded(r, e):
		return waitForSlot
	case r.LedByAuth && r.Mail.Class() != 2:
		return retryNow // the relay does not take commands behind AUTH, which goes alone from now on
	case e.Reply.throttles(e.Op):
		return waitForPace
	case late(r, e):
		return retryNow // the connection was used up or dead before this message came
	case r.Seq > 1 && e.Reply.says(tooManyMessages, e.Op):
		return retryNow // the connection has had its share; another one may have this message
	case !moved && r.Seq > 1 && e.Reply.endsSession(e.Op, r.Seq, r.Worked):
		return tryElsewhere
	}
	return c.nextByReply(r, e, moved)
}

// nextByReply tells what follows a refusal, or a loss, that is about the message or the relay as a whole.
func (c Retry) nextByReply(r *conn.Result, e *Error, moved bool) next {
	switch {
	case e.Reply.Code == 0, !r.Begun, e.Reply.Code == 421 && e.Op != OpAuth:
		return retryLater // the relay is closing, or gone, and has taken nothing (RFC 5321, 3.8)
	case e.Op == OpRset, e.Reply.Code < 400 && r.Overlapped:
		return retryNow // the relay does not know RSET, or has thrown away what stood behind a final dot: that is not tried again
	case e.Reply.Code < 400:
		return retryLater // no refusal, but a relay that is out of step
	case e.Op == OpMail && e.Reply.Code == 503 && r.Seq > 1 && !moved:
		return tryElsewhere // our idea of the connection's state was wrong
	case e.Temporary() && c.On4xx:
		return retryLater
	}
	return giveUp // when in doubt, tell the caller
}

// crowded reports whether the relay says that there are too many connections: behind AUTH, where its words would be taken for a
// refusal of the credentials, or by the code that Microsoft 365 has for it ("Concurrent connections limit exceeded").
func crowded(r *conn.Result, e *Error) bool {
	if e.Reply.Code == 432 {
		return true
	}
	return r.LedByAuth && (publicReply(r.Auth).says(saysTooManyConns, OpAuth) || publicReply(r.Mail).says(saysTooManyConns, OpMail))
}

// late reports whether a transaction was not even begun for the relay, on a connection that had dealt with another message
// before. Each such loss stands for a message that came to its end, which bounds how often it can happen.
func late(r *conn.Result, e *Error) bool {
	if r.Used <= 1 && !r.AfterIdle || r.Mail.Class() == 2 {
		return false
	}
	if !r.Begun {
		return true // the connection has ended before a word of this one, whatever the relay has said about that
	}
	mail := publicReply(r.Mail)
	return e.Reply.Code == 0 || e.Reply.Code == 421 || mail.says(idleTooLong, OpMail) || mail.says(tooManyMessages, OpMail)
}

// sleep waits for d or the end of ctx or of the Client.
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
