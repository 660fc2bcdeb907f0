package smtprelay

import (
	"errors"
	"net/textproto"

	"github.com/emersion/go-smtp"
)

// Scope is what an [Error] is about: whose fault it is, as far as sending again is concerned.
type Scope int

const (
	// ScopeUnknown: nothing is known. No error of this package has it.
	ScopeUnknown Scope = iota
	// ScopeRecipient: the relay refused recipients, each for itself (a reply to RCPT).
	ScopeRecipient
	// ScopeMessage: the message as a whole is at fault: the relay refused MAIL, DATA or the end of the message, the message
	// cannot be sent to this relay, or its Body failed.
	ScopeMessage
	// ScopeRelay: the relay or the way to it is at fault, and the message is not: dial, greeting, TLS, EHLO, AUTH, a refusal
	// for want of authentication (RFC 4954, 6), one connection or message too many, a connection lost or out of step (503), 421;
	// and a wait for a connection that ended while none could be opened.
	ScopeRelay
	// ScopeCaller: the program that calls has ended it or has not begun it right: the context ended, the Client was closed,
	// the Config is wrong.
	ScopeCaller
)

// String returns "unknown", "recipient", "message", "relay" or "caller". It is made for the labels of metrics.
func (s Scope) String() string {
	switch s {
	case ScopeRecipient:
		return "recipient"
	case ScopeMessage:
		return "message"
	case ScopeRelay:
		return "relay"
	case ScopeCaller:
		return "caller"
	}
	return "unknown"
}

// scopeOfReply is what r, the relay's reply to op, is about, where it is not the one that was hoped for.
func scopeOfReply(op Op, r Reply) Scope {
	switch r.Code {
	case 421, 503: // leaving (RFC 5321, 3.8); out of step, which no message can cause (4.3.2)
		return ScopeRelay
	case 432, 530, 534, 535, 538: // authentication (RFC 4954, 6); 432 is also one connection too many
		return ScopeRelay
	}
	switch {
	case r.Code < 400, r.says(tooManyConns, op), r.says(tooManyMessages, op), r.says(idleTooLong, op), r.throttles(op):
		return ScopeRelay
	case r.says(recipientBusy, op):
		return ScopeRecipient
	case op != OpRcpt && (r.says(quotaUsedUp, op) || r.says(loginForgotten, op)):
		return ScopeRelay
	case op == OpRcpt:
		return ScopeRecipient
	case op == OpMail, op == OpData, op == OpBody, op == OpEnd:
		return ScopeMessage
	}
	return ScopeRelay
}

// OutcomeOf returns what became of a message for which a Send, or another function that sends mail, has returned err:
//
//   - nil: [Accepted], for every recipient.
//   - an [*Error], wrapped or not: its Outcome. Accepted means for some of the recipients.
//   - a refusal (4xx or 5xx) that another library tells as a *textproto.Error (net/smtp) or a *smtp.SMTPError (go-smtp):
//     [NotAccepted].
//   - any other error: [Unknown].
func OutcomeOf(err error) Outcome {
	if err == nil {
		return Accepted
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Outcome
	}
	if isRefusal(foreignCode(err)) {
		return NotAccepted
	}
	return Unknown
}

// ShouldRetry reports whether a queue should keep the message for which a Send has returned err, and send it again later as
// it is: nobody has it, so that nothing is delivered twice, and the message itself is not at fault, or only for now.
//
// It is true for a 4xx reply to the message, for whatever went wrong before the relay spoke about the message (no connection, no
// TLS, refused credentials: all of that can be mended without touching the message), for [ErrClosed], for a context that
// ended and for a Config that is wrong. It is true where all recipients were refused and one of them only for now: see [RetryTo].
//
// It is false for nil, for a message accepted for somebody or with an unknown outcome, for a 5xx reply to MAIL, DATA, the end of
// the message or every RCPT, and for a message that cannot be sent as it is. Of the errors of other libraries it knows those
// that [OutcomeOf] knows: true for 4xx.
func ShouldRetry(err error) bool {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.shouldRetry()
	}
	return foreignCode(err)/100 == 4
}

// RetryTo returns the recipients, of those of the message for which a Send has returned err, for whom sending it again is safe
// and may help, in the envelope's order: those who were refused with 4xx, and those whom the relay was not asked about. It never
// names one for whom the message was accepted or may have been, nor one who was refused with 5xx. Where ShouldRetry is false and
// nobody has the message, there is none.
func RetryTo(err error) []string {
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Outcome == NotAccepted && !e.shouldRetry() {
		return nil
	}
	var to []string
	for _, r := range e.Recipients {
		if e.mayHelp(r) {
			to = append(to, r.To)
		}
	}
	return to
}

func (e *Error) shouldRetry() bool {
	switch {
	case e.Outcome != NotAccepted:
		return false
	case e.Scope == ScopeRelay, e.Scope == ScopeCaller:
		return true
	case e.permanent:
		return false
	case e.Scope == ScopeRecipient && len(e.Recipients) > 0:
		for _, r := range e.Recipients {
			if e.mayHelp(r) {
				return true
			}
		}
		return false
	case e.Reply.Code == 0:
		return e.Op != OpCheck
	}
	return onlyForNow(e.Reply)
}

// mayHelp reports whether sending again to r is safe and may help.
func (e *Error) mayHelp(r RecipientResult) bool {
	switch {
	case r.Outcome != NotAccepted, r.Err != nil:
		return false
	case r.Reply.Code >= 400 && r.Reply == e.Reply && (e.Scope == ScopeRelay || e.Scope == ScopeCaller):
		return true // it is not about the recipient
	}
	return r.Reply.Code < 400 || onlyForNow(r.Reply)
}

// onlyForNow reports whether a refusal may be another one next time.
func onlyForNow(r Reply) bool {
	return r.Code/100 == 4 || r.says(tooManyRcpts, OpRcpt) && r.Code == 552
}

// foreignCode is the code of the reply that another library's error tells; 0 if there is none.
func foreignCode(err error) int {
	if e, ok := errors.AsType[*textproto.Error](err); ok {
		return e.Code
	}
	if e, ok := errors.AsType[*smtp.SMTPError](err); ok {
		return e.Code
	}
	return 0
}

func isRefusal(code int) bool { return code/100 == 4 || code/100 == 5 }
