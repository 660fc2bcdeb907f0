package smtprelay

import (
	"errors"
	"net/textproto"

	"github.com/emersion/go-smtp"
)

// Scope is what is at fault in an [Error], as far as sending again is concerned.
type Scope int

const (
	// ScopeUnknown is the zero value. No error of this package has it.
	ScopeUnknown Scope = iota
	// ScopeRecipient: the relay refused single recipients (a reply to RCPT).
	ScopeRecipient
	// ScopeMessage: the message as a whole. The relay refused MAIL, DATA or the end of the message, the message has a mistake or needs
	// an extension that the relay lacks, or its Body failed.
	ScopeMessage
	// ScopeRelay: the relay, the network or the credentials, and not the message. Dial, greeting, TLS, EHLO or AUTH failed; the relay
	// wanted authentication (RFC 4954, 6) or had too many connections or messages; the connection was lost or ended with 421 or 503;
	// or the context ended while no connection could be opened.
	ScopeRelay
	// ScopeCaller: the calling program. The context ended, the Client was closed or had too many Sends waiting, or the Config is wrong.
	ScopeCaller
)

// String returns "unknown", "recipient", "message", "relay" or "caller", for use as the label of a metric.
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

// scopeOfReply returns the Scope of r, an unexpected or negative reply to op.
func scopeOfReply(op Op, r Reply) Scope {
	switch r.Code {
	case 421, 503: // closing (RFC 5321, 3.8); bad sequence of commands, which no message can cause (4.3.2)
		return ScopeRelay
	case 432, 530, 534, 535, 538: // authentication (RFC 4954, 6); 432 is also used for too many connections
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

// OutcomeOf returns the outcome of a message for which Send, or a function of another library, has returned err:
//
//   - nil: [Accepted], for every recipient.
//   - an [*Error], wrapped or not: its Outcome. Accepted means: for some of the recipients.
//   - a 4xx or 5xx reply in an error of another library, a *textproto.Error (net/smtp) or a *smtp.SMTPError (go-smtp): [NotAccepted].
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

// ShouldRetry reports whether a queue should keep the message for which Send has returned err, and send it again later as it is.
//
// It is true if the message was not accepted for any recipient, and the failure was not the message's fault or is temporary:
//
//   - a 4xx reply to the message, or to one of its recipients where all were refused (see [RetryTo]);
//   - whatever failed before the relay replied to the message: the connection, TLS, refused credentials;
//   - [ErrClosed], [ErrBusy], a context that ended, a Config with mistakes.
//
// It is false for nil; for a message that was accepted for some recipient or whose outcome is [Unknown]; for a 5xx reply to
// MAIL, DATA, the end of the message or every RCPT; and for a message that cannot be sent as it is. It recognizes the same
// errors of other libraries as [OutcomeOf], and is true for 4xx.
func ShouldRetry(err error) bool {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.shouldRetry()
	}
	return foreignCode(err)/100 == 4
}

// RetryTo returns the recipients to whom the message for which Send has returned err should be sent again, in the order of
// Message.To: those that were refused with 4xx, and those for which the relay was not asked. It never returns a recipient for
// whom the message was or may have been accepted, or who was refused with 5xx. It returns nil for a nil err, for an err without
// an [*Error], and if the message was accepted for no recipient and ShouldRetry is false.
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

// mayHelp reports whether sending to r again is safe and may succeed.
func (e *Error) mayHelp(r RecipientResult) bool {
	switch {
	case r.Outcome != NotAccepted, r.Err != nil:
		return false
	case r.Reply.Code >= 400 && r.Reply == e.Reply && (e.Scope == ScopeRelay || e.Scope == ScopeCaller):
		return true // the reply is not about the recipient
	}
	return r.Reply.Code < 400 || onlyForNow(r.Reply)
}

// onlyForNow reports whether a refusal is temporary.
func onlyForNow(r Reply) bool {
	return r.Code/100 == 4 || r.says(tooManyRcpts, OpRcpt) && r.Code == 552
}

// foreignCode returns the reply code in an error of another library; 0 if there is none.
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
