package smtprelay

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// delivery is one Send: the transactions that it takes until each recipient's fate is known.
type delivery struct {
	c       *Client
	ctx     context.Context
	m       Message
	msg     conn.Message  // what the next transaction sends of it
	mail    MailOptions   // what the caller asks for
	utf8    string        // the first address that is not ASCII
	dsnFor  string        // the first recipient whose options need DSN; "" if there is none
	rrvsFor string        // the same for RRVS
	rcpts   rcptLimit     // how many recipients go into one transaction
	todo    []int         // recipients whose fate is open, as indexes into m.To, in the envelope's order
	unfit   map[int]error // recipients who cannot be named to this relay, and why
	receipt Receipt

	attempts int    // tries that failed and counted
	tries    int    // all of them
	unknown  *Error // of a transaction whose fate is unknown
	refusal  *Error // what the first recipient that was refused for itself was told
}

// run makes transactions until nothing is left to do.
func (d *delivery) run() (Receipt, error) {
	for len(d.todo) > 0 {
		s, err := d.c.pool.take(d.ctx, &d.attempts)
		if err != nil {
			return d.end(err)
		}
		rcpts, err := d.fit(s)
		if err != nil {
			d.c.pool.release(s)
			return d.end(err)
		}
		if len(rcpts) == 0 { // no more domains on this session
			s.Retire(conn.Full)
			d.c.pool.release(s)
			continue
		}
		if d.tries++; d.tries > 1 {
			d.c.cfg.stats.retries.Add(1)
		}
		t := conn.NewTransaction(d.ctx, s.Conn, d.msg)
		err = d.settle(s, rcpts, t.Run())
		t.Recycle()
		if err != nil {
			return d.end(err)
		}
	}
	return d.end(nil)
}

// settle takes in what became of a transaction on s for rcpts, and waits where another one is due after a while. An error
// ends the Send.
func (d *delivery) settle(s *session, rcpts []int, r conn.Result) *Error {
	e := verdict(&d.m, rcpts, &r)
	r = believed(r)
	d.msg.Body, d.msg.Size = r.Body, r.Size
	if e != nil {
		d.c.cfg.explainAuth(e)
		d.c.cfg.explainRefusal(e, s.Extensions(), s.TLS() == nil)
		d.c.cfg.explainSilence(e, s.Extensions())
		d.c.pool.learn(s, e)
	}
	if r.Auth.Class() == 2 {
		d.c.pool.worked()
	}
	wait := d.note(rcpts, &r, e)
	d.c.cfg.explainRefusal(d.refusal, s.Extensions(), s.TLS() == nil)
	d.learnRcpts(&r, e)
	if e != nil && e.Op == OpRcpt && e.Code >= 400 && e.Code != 421 && !d.m.AllOrNothing {
		e = nil // each of these recipients was refused for itself; the others have not been tried
	}
	switch {
	case len(d.todo) == 0:
		return nil
	case e != nil:
		return d.pause(d.c.cfg.Retry.next(d.msg.Body, &r, e), e)
	case r.BodyBegun && conn.OneShot(d.msg.Body):
		return &Error{Op: OpBody, Outcome: NotAccepted, Err: errBodyUsed}
	case wait != nil:
		return d.pause(retryLater, wait)
	}
	return nil
}

// errBodyUsed is told for recipients that need another transaction.
var errBodyUsed = errors.New("the body can be written only once, and that was for other recipients")

// note writes down the fate of each of rcpts, the recipients of a transaction that ended in r with the verdict e. Those that
// wait for another transaction stay in d.todo; if that is because the relay refused them for now, the error says so.
func (d *delivery) note(rcpts []int, r *conn.Result, e *Error) (wait *Error) {
	queueID := ""
	if e == nil {
		final := publicReply(r.Final)
		queueID = findQueueID(final.Message)
		d.receipt.Reply, d.receipt.QueueID = final, queueID
	}
	var open []int
	for i, to := range rcpts {
		rcpt := &d.receipt.Recipients[to]
		rcpt.Reply = publicReply(r.Rcpt[i])
		refusal := func() *Error {
			return &Error{Op: OpRcpt, subject: printable.Address(rcpt.To), Reply: rcpt.Reply, Outcome: NotAccepted}
		}
		switch fateOf(&d.m, r, i, e, d.c.cfg.Retry.Temporary) {
		case fateAccepted:
			rcpt.Outcome, rcpt.QueueID = Accepted, queueID
		case fateUnknown:
			rcpt.Outcome = Unknown
			d.unknown = e
		case fateOpen:
			open = append(open, to)
		case fateLater:
			open = append(open, to)
			wait = refusal()
		case fateRefused:
			if d.refusal == nil || d.refusal.Op == OpCheck { // the relay's words go before ours
				d.refusal = refusal()
			}
		}
	}
	d.todo = d.todo[len(rcpts)-len(open):] // in place: there may be thousands, and a transaction for each
	copy(d.todo, open)
	return wait
}

// learnRcpts takes in what a transaction tells of how many recipients the relay takes in one.
func (d *delivery) learnRcpts(r *conn.Result, e *Error) {
	tooMany, sure := countTooMany(r)
	if !mailed(r) || tooMany == 0 && (e != nil || d.rcpts.most == 0) {
		return
	}
	accepted := r.Accepted()
	d.rcpts.took(len(r.Rcpt), accepted, tooMany)
	if tooMany == 0 || accepted > 0 && sure {
		d.c.cfg.profile.rcptsTaken(len(r.Rcpt), accepted, tooMany)
	}
}

// pause waits before the next try if there is one, as what says. Else it returns e, the reason.
func (d *delivery) pause(what next, e *Error) *Error {
	if what == waitForSlot {
		what = retryLater
		if d.c.pool.open() > 1 {
			what = retryNow // the others work, and whoever waits is served in turn
		}
	}
	if what == retryNow {
		d.traceRetry(0, e)
		return nil
	}
	d.attempts++
	if what == giveUp || d.c.cfg.Retry.exhausted(d.attempts) {
		return e
	}
	wait := d.c.cfg.Retry.backoff(d.attempts)
	d.traceRetry(wait, e)
	if err := sleep(d.ctx, wait, d.c.pool.ending); err != nil {
		return &Error{Op: e.Op, subject: e.subject, Reply: e.Reply, Outcome: NotAccepted, Err: err}
	}
	return nil
}

func (d *delivery) traceRetry(wait time.Duration, e *Error) {
	if t := d.c.cfg.Trace; t != nil && t.Retry != nil {
		t.Retry(d.ctx, d.attempts, wait, e)
	}
}

// end makes the receipt and the error of the whole. Recipients still in d.todo share the fate that e tells.
func (d *delivery) end(e *Error) (Receipt, error) {
	if e != nil {
		for _, to := range d.todo {
			if r := &d.receipt.Recipients[to]; r.Code/100 < 4 || e.Op != OpRcpt && e.Code/100 >= 4 {
				r.Reply = e.Reply
			}
		}
	}
	some, whole := false, d.refusal == nil && d.unknown == nil
	var refused []RecipientError
	for i, r := range d.receipt.Recipients {
		if r.Outcome == Accepted {
			some = true
		} else {
			refused = append(refused, RecipientError{To: r.To, Reply: r.Reply, Outcome: r.Outcome, Err: d.unfit[i]})
		}
	}
	if len(refused) == 0 {
		return d.receipt, nil
	}
	switch {
	case d.unknown != nil:
		e = d.unknown
	case e == nil:
		e = d.refusal
	}
	if some || !whole || (d.m.AllOrNothing && e.Op == OpRcpt) {
		e.Refused = refused
	}
	switch {
	case d.unknown != nil:
		e.Outcome = Unknown
	case some:
		e.Outcome = Accepted
	default:
		e.Outcome = NotAccepted
	}
	e.Attempts = max(d.attempts, 1)
	return d.receipt, e
}

// begin checks the message and fills in what the delivery needs to know of it.
func (d *delivery) begin() error {
	if err := conn.ContextError(d.ctx); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err}
	}
	if err := d.m.check(); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err, permanent: true}
	}
	if d.m.MailOptions != nil {
		d.mail = *d.m.MailOptions
	}
	if !isASCII(d.m.From) {
		d.utf8 = d.m.From
	} else if i := slices.IndexFunc(d.m.To, func(to string) bool { return !isASCII(to) }); i >= 0 {
		d.utf8 = d.m.To[i]
	}
	d.msg = conn.Message{From: d.m.From, To: d.m.To, AllOrNothing: d.m.AllOrNothing, Body: d.m.Body, Size: canonicalSize(&d.m)}
	if options := d.m.RcptOptions; len(options) > 0 {
		d.msg.Params = func(addr string) wire.RcptParams { return options[addr].params() }
	}
	if len(d.m.To) > 1 {
		d.rcpts = d.c.cfg.profile.maxRcpts()
	}
	d.todo = make([]int, len(d.m.To))
	d.receipt.Recipients = make([]RecipientReceipt, len(d.m.To))
	for i, to := range d.m.To {
		d.todo[i] = i
		d.receipt.Recipients[i] = RecipientReceipt{To: to, Outcome: NotAccepted}
		if o := d.m.RcptOptions[to]; o != nil {
			if d.dsnFor == "" && o.needsDSN() {
				d.dsnFor = to
			}
			if d.rrvsFor == "" && o.needsRRVS() {
				d.rrvsFor = to
			}
		}
	}
	return nil
}

// canonicalSize is the size of a body that is known before it is written, or 0.
func canonicalSize(m *Message) int64 {
	if b, ok := m.Body.(conn.Bytes); ok {
		return wire.CanonicalSize(b)
	}
	return 0
}
