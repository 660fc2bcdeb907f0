package smtprelay

import (
	"errors"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// The outcome of a message. These are pure functions of a transaction's Result: they use no connection and take no lock.
//
// Before the end of the message (the final dot or the last chunk) is sent, the relay has accepted nothing. Once it may have been
// sent, only the relay's reply decides; without a reply the outcome is unknown.

// verdict returns the error of the transaction of m for rcpts that ended in r; nil if the relay has accepted the message for at
// least one recipient.
func verdict(m *Message, rcpts []int, r *conn.Result) *Error {
	e := judge(m, rcpts, r)
	if e != nil && e.Scope == ScopeUnknown {
		e.Scope = scopeOf(e, r)
	}
	return e
}

// scopeOf returns the Scope of e, the verdict on r.
func scopeOf(e *Error, r *conn.Result) Scope {
	switch {
	case e.Reply.Code != 0:
		return scopeOfReply(e.Op, e.Reply)
	case r.CtxErr != nil && e.Err == r.CtxErr, errors.Is(e.Err, ErrClosed):
		return ScopeCaller
	case r.BodyErr != nil && e.Err == r.BodyErr:
		return ScopeMessage
	}
	return ScopeRelay
}

func judge(m *Message, rcpts []int, r *conn.Result) *Error {
	switch {
	case r.EndErr != nil:
		return &Error{Op: OpEnd, Outcome: NotAccepted, Scope: ScopeCaller, Err: r.EndErr}
	case doubtful(r):
		return &Error{Op: OpEnd, Reply: publicReply(r.Final), Outcome: Unknown}
	case r.Final.Class() == 2 && r.Accepted() > 0:
		return nil
	case dubious(r):
		return lostAt(OpData, "", r)
	}
	if e := refusal(m, rcpts, r); e != nil && !shifted(r) && (r.Final.Code != 0 || r.End == conn.EndUnwritten || decides(e, r)) {
		return e
	}
	switch {
	case r.Final.Code != 0:
		return &Error{Op: OpEnd, Reply: publicReply(r.Final), Outcome: NotAccepted}
	case r.End >= conn.EndDue && !after421(r):
		err := r.CtxErr
		if err == nil {
			err = conn.Explain(r.Lost)
		}
		return &Error{Op: OpEnd, Outcome: Unknown, Err: err}
	}
	return unsent(m, rcpts, r)
}

// refusal returns the error for the relay's first refusal in the envelope; nil if there is none.
func refusal(m *Message, rcpts []int, r *conn.Result) *Error {
	step, i := r.Refusal(m.AllOrNothing)
	e := &Error{Op: opOf(step), Outcome: NotAccepted}
	switch step {
	case conn.StepAuth:
		e.Reply = publicReply(r.Auth)
	case conn.StepRset:
		e.Reply = publicReply(r.Rset)
	case conn.StepMail:
		e.subject, e.Reply = printable.Address(m.From), publicReply(r.Mail)
	case conn.StepRcpt:
		e.subject, e.Reply = printable.Address(m.To[rcpts[i]]), publicReply(r.Rcpt[i])
	case conn.StepData:
		e.Reply = publicReply(r.Data)
	default:
		return nil
	}
	return e
}

// decides reports whether e, a refusal in the envelope, proves that the message was not accepted, although its end has no reply.
// A refused RSET does not, unless the relay replied 421. Nor does a refusal of MAIL or RCPT if the relay has accepted a
// recipient.
func decides(e *Error, r *conn.Result) bool {
	switch e.Op {
	case OpRset:
		return e.Reply.Code == 421
	case OpMail, OpRcpt:
		// A relay that replied 421 and closed with FIN was shutting down, and has not accepted anything after that.
		return r.Agreed() == 0 || e.Reply.Code == 421 && r.Left421
	}
	return true
}

// doubtful reports whether the final reply may belong to another command, or it is unclear which recipients it covers. With
// DATA, the final reply follows a 354, which answers only DATA, so it belongs to the final dot. With chunks, a relay that sends
// a reply too many or too few shifts one 250 to another command. So a 250 counts only if all earlier replies are consistent with
// it.
func doubtful(r *conn.Result) bool {
	switch class := r.Final.Class(); {
	case class == 3, r.Contradicted, r.Chunked && r.After421:
		return true
	case class != 2 || r.Agreed() == 0:
		return false
	}
	return r.MailRefused() || r.Data.Class() >= 4 || r.Chunked && r.Rset.Code != 0 && r.Rset.Class() != 2
}

// shifted reports whether the replies to the envelope may belong to other commands, although the end of the message may have
// been sent: a reply was impossible for its command, and the end of the message has no reply.
func shifted(r *conn.Result) bool {
	return r.OutOfStep && r.Final.Code == 0 && r.End != conn.EndUnwritten
}

// dubious reports whether the replies to an envelope after a final dot may belong to other commands. A relay that discards some
// of the commands after the dot sends too few replies, until one side ends the connection.
func dubious(r *conn.Result) bool {
	if !r.Overlapped || r.End != conn.EndUnwritten || r.Lost == nil || r.Rset.Class() != 2 {
		return false
	}
	_, ended := r.Lost.(*conn.ReplyError) // 421, or a reply that is impossible for its command
	return ended || r.Waiting != "" && conn.IsTimeout(r.Lost)
}

// believed returns r without replies to RCPT that may belong to other commands.
func believed(r conn.Result) conn.Result {
	if dubious(&r) || shifted(&r) || r.Chunked && doubtful(&r) {
		r.Rcpt = make([]wire.Reply, len(r.Rcpt))
	}
	return r
}

// after421 reports whether the relay replied 421 to an earlier transaction, sent no further reply, and closed the connection
// with FIN. Replies are in order (RFC 2920, 3.2), so the relay was shutting down before it reached this transaction and has not
// accepted its message.
func after421(r *conn.Result) bool {
	return r.Left421 && r.Auth.Code == 0 && r.Rset.Code == 0 && r.Mail.Code == 0
}

// unsent returns the error of a message whose end was not sent and which the relay has not refused.
func unsent(m *Message, rcpts []int, r *conn.Result) *Error {
	op, subject := OpEnd, ""
	switch {
	case !r.Begun:
		op = OpWait
	case r.Waiting == conn.StepMail:
		op, subject = OpMail, printable.Address(m.From)
	case r.Waiting == conn.StepRcpt:
		op, subject = OpRcpt, printable.Address(m.To[rcpts[r.WaitingRcpt]])
	case r.Waiting == conn.StepBdat:
		op = OpBody
	case r.Waiting != "":
		op = opOf(r.Waiting)
	case r.End == conn.EndUnwritten:
		op = OpBody
	}
	e := lostAt(op, subject, r)
	if r.BodyErr != nil {
		e.Op, e.Err = OpBody, r.BodyErr
		_, e.permanent = r.BodyErr.(*conn.SizeError)
		e.permanent = e.permanent || errors.Is(r.BodyErr, conn.ErrEmptyBody)
	}
	if r.CtxErr != nil && (r.BodyErr == nil || r.Cancelled) && e.Reply.Code == 0 {
		e.Err = r.CtxErr
	}
	return e
}

// lostAt returns the error of a connection that was lost before the end of the message was sent.
func lostAt(op Op, subject string, r *conn.Result) *Error {
	e := &Error{Op: op, subject: subject, Outcome: NotAccepted}
	switch cause := r.Lost.(type) {
	case *conn.UnexpectedReply:
		if cause.Reply.Class() >= 4 { // the relay says why it refuses the body
			e.Reply = publicReply(cause.Reply)
		} else {
			e.Err = cause
		}
	case *conn.ReplyError: // a reply to another transaction: only 421 concerns this one
		if cause.Reply.Code == 421 {
			e.Reply = publicReply(cause.Reply)
		} else {
			e.Err = cause
		}
	default:
		e.Err = conn.Explain(cause)
	}
	return e
}

// fate is the result of a transaction for one of its recipients.
type fate int

const (
	fateAccepted fate = iota
	fateUnknown
	fateOpen    // not decided: another transaction may follow
	fateLater   // refused temporarily: another transaction follows after a backoff
	fateRefused // the relay has refused this recipient
)

// fateOf returns the fate of the ith recipient of a transaction that ended in r with the verdict e. temporary means that 4xx
// replies are retried (Retry.On4xx). moved means that the message was tried on other connections often enough.
func fateOf(m *Message, r *conn.Result, i int, e *Error, temporary, moved bool) fate {
	reply := publicReply(r.Rcpt[i])
	class := reply.Code / 100
	switch {
	case e != nil && e.Outcome == Unknown && (class == 0 || class == 2):
		// With chunks, the message is sent together with its envelope, so the reply to RCPT may be missing.
		return fateUnknown
	case e == nil && class == 2:
		return fateAccepted
	case m.AllOrNothing, class < 4, reply.Code == 421, !mailed(r):
		return fateOpen
	case reply.says(tooManyRcpts, OpRcpt) && r.Accepted() > 0, reply.throttles(OpRcpt):
		return fateOpen
	case r.Seq > 1 && (reply.says(tooManyMessages, OpRcpt) || !moved && reply.endsSession(OpRcpt, r.Seq, r.Worked)):
		return fateOpen // the refusal is about the connection
	case temporary && class == 4:
		return fateLater
	}
	return fateRefused
}

// mailed reports whether the relay has accepted MAIL, and AUTH has not failed.
func mailed(r *conn.Result) bool {
	return r.Mail.Class() == 2 && !r.AuthRefused()
}

// countTooMany counts the "too many recipients" replies to RCPT. sure means that they were about the number of recipients, and
// not about single mailboxes.
func countTooMany(r *conn.Result) (tooMany int, sure bool) {
	sure = true
	for i := range r.Rcpt {
		if r.Rcpt[i].Class() == 2 {
			sure = sure && tooMany == 0
			continue
		}
		reply := publicReply(r.Rcpt[i])
		if r.Seq > 1 && reply.endsSession(OpRcpt, r.Seq, r.Worked) {
			continue // the reply is about the connection, not about this transaction
		}
		if reply.says(tooManyRcpts, OpRcpt) {
			tooMany++
			sure = sure && (reply.says(numberOfRcpts, OpRcpt) || reply.EnhancedCode == EnhancedCode{} && len(r.Rcpt) > 2)
		}
	}
	return tooMany, sure
}
