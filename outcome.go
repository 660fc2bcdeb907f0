package smtprelay

import (
	"errors"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// What became of a message. These are functions of a transaction's Result: they ask no connection and take no lock.
//
// Until the end of the message (the final dot, or the last chunk) has left, the relay has accepted nothing. Once it may have
// left, only the relay's reply tells, and without one the outcome is unknown.

// verdict returns what became of the transaction of m for rcpts that ended in r; nil if the relay has accepted the message,
// for the recipients that it has accepted.
func verdict(m *Message, rcpts []int, r *conn.Result) *Error {
	e := judge(m, rcpts, r)
	if e != nil && e.Scope == ScopeUnknown {
		e.Scope = scopeOf(e, r)
	}
	return e
}

// scopeOf is what e, the verdict on r, is about.
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
	case r.End >= conn.EndDue && !behind421(r):
		err := r.CtxErr
		if err == nil {
			err = conn.Explain(r.Lost)
		}
		return &Error{Op: OpEnd, Outcome: Unknown, Err: err}
	}
	return unsent(m, rcpts, r)
}

// refusal is the error of the relay's first refusal in the envelope; nil if there is none.
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

// decides reports whether e, a refusal in the envelope, means that what was sent behind it is not accepted, although there is
// no reply to its end. A refused RSET says nothing of what stands behind it, unless the relay leaves. Nor does a refusal where
// another recipient was accepted, or MAIL was refused and a recipient accepted.
func decides(e *Error, r *conn.Result) bool {
	switch e.Op {
	case OpRset:
		return e.Reply.Code == 421
	case OpMail, OpRcpt:
		// A relay that has said 421 and closed in order was leaving, and has taken nothing of what came behind.
		return r.Agreed() == 0 || e.Reply.Code == 421 && r.Left421
	}
	return true
}

// doubtful reports whether the final reply may be that to another command, or whether nobody knows for whom and for how much
// of the message it speaks. By DATA it is that to the final dot: 354 stands before it, and is the reply to no other command. In
// chunks a relay that answers one command twice, or with too little, makes one 250 pass for another; so its 250 counts only
// where all that it said before fits.
func doubtful(r *conn.Result) bool {
	switch class := r.Final.Class(); {
	case class == 3, r.Contradicted, r.Chunked && r.After421:
		return true
	case class != 2 || r.Agreed() == 0:
		return false
	}
	return r.MailRefused() || r.Data.Class() >= 4 || r.Chunked && r.Rset.Code != 0 && r.Rset.Class() != 2
}

// shifted reports whether the replies to an envelope whose message has left may be those to other commands: one of them was out
// of step, and the end of the message has no reply.
func shifted(r *conn.Result) bool {
	return r.OutOfStep && r.Final.Code == 0 && r.End != conn.EndUnwritten
}

// dubious reports whether the replies to an envelope behind a final dot may be those to other commands: a relay that throws
// away a part of what came with the dot is short of as many replies, until one side ends the connection.
func dubious(r *conn.Result) bool {
	if !r.Overlapped || r.End != conn.EndUnwritten || r.Lost == nil || r.Rset.Class() != 2 {
		return false
	}
	_, ended := r.Lost.(*conn.ReplyError) // 421, or one that cannot be the reply to its command
	return ended || r.Waiting != "" && conn.IsTimeout(r.Lost)
}

// believed returns r without the replies that may be those to other commands.
func believed(r conn.Result) conn.Result {
	if dubious(&r) || shifted(&r) || r.Chunked && doubtful(&r) {
		r.Rcpt = make([]wire.Reply, len(r.Rcpt))
	}
	return r
}

// behind421 reports whether the relay has said 421 to a transaction before this one, and nothing more until it closed in
// order: replies come in order (RFC 2920, 3.2), so it was leaving when it came to this one, and has taken nothing of it.
func behind421(r *conn.Result) bool {
	return r.Left421 && r.Auth.Code == 0 && r.Rset.Code == 0 && r.Mail.Code == 0
}

// unsent is the error of a message whose end has not left, and which the relay has not refused.
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

// lostAt is the error of a connection that was lost before the end of the message had left.
func lostAt(op Op, subject string, r *conn.Result) *Error {
	e := &Error{Op: op, subject: subject, Outcome: NotAccepted}
	switch cause := r.Lost.(type) {
	case *conn.UnexpectedReply:
		if cause.Reply.Class() >= 4 { // the relay says why it does not take the body
			e.Reply = publicReply(cause.Reply)
		} else {
			e.Err = cause
		}
	case *conn.ReplyError: // to what another transaction had asked: only 421 is for all
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

// fate is what a transaction means for one of its recipients.
type fate int

const (
	fateAccepted fate = iota
	fateUnknown
	fateOpen    // another transaction decides, if the Send makes one
	fateLater   // refused for now: another transaction after a wait
	fateRefused // the relay has refused this recipient
)

// fateOf is what the transaction that ended in r and its verdict e means for the ith of its recipients. temporary: 4xx is
// tried again (Retry.On4xx). moved: the message was tried on another connection already since one refused it for now.
func fateOf(m *Message, r *conn.Result, i int, e *Error, temporary, moved bool) fate {
	reply := publicReply(r.Rcpt[i])
	class := reply.Code / 100
	switch {
	case e != nil && e.Outcome == Unknown && (class == 0 || class == 2):
		// In chunks the message leaves with its envelope, whose replies may be missing.
		return fateUnknown
	case e == nil && class == 2:
		return fateAccepted
	case m.AllOrNothing, class < 4, reply.Code == 421, !mailed(r):
		return fateOpen
	case reply.says(tooManyRcpts, OpRcpt) && r.Accepted() > 0, reply.throttles(OpRcpt):
		return fateOpen
	case r.Seq > 1 && (reply.says(tooManyMessages, OpRcpt) || !moved && reply.endsSession(OpRcpt, r.Seq, r.Worked)):
		return fateOpen // the connection has had its share
	case temporary && class == 4:
		return fateLater
	}
	return fateRefused
}

// mailed reports whether the relay has accepted MAIL, from who we say we are.
func mailed(r *conn.Result) bool {
	return r.Mail.Class() == 2 && !r.AuthRefused()
}

// countTooMany counts the recipients who were told that there are too many. sure: that was about their number, and not about
// some of their mailboxes.
func countTooMany(r *conn.Result) (tooMany int, sure bool) {
	sure = true
	for i := range r.Rcpt {
		reply := publicReply(r.Rcpt[i])
		if r.Seq > 1 && reply.endsSession(OpRcpt, r.Seq, r.Worked) {
			continue // the session has had too many, in all its transactions together
		}
		if reply.says(tooManyRcpts, OpRcpt) {
			tooMany++
			sure = sure && (reply.says(numberOfRcpts, OpRcpt) || reply.EnhancedCode == EnhancedCode{} && len(r.Rcpt) > 2)
		} else if reply.Code/100 == 2 && tooMany > 0 {
			sure = false
		}
	}
	return tooMany, sure
}
