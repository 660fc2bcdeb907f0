package smtprelay

import (
	"context"
	"io"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// NullSender, in Message.From, is the null reverse-path (RFC 5321, 4.5.5): that of a mail which is itself a report of
// failure, or an answer given by a program, and is to cause no report.
const NullSender = "<>"

// Message is a mail and its envelope. Printing it, with any verb or through log/slog, shows the envelope and never the body.
type Message struct {
	// From is the reverse-path, to which the relay reports failures: an address without angle brackets or display name,
	// or [NullSender]. Empty is a mistake. It has at most 254 octets, 64 of them before @ (RFC 5321,
	// 4.5.3.1). Angle brackets, control and invisible characters are an error, in quotes too: a relay with a simple parser
	// could read a parameter in them, or another address.
	From string

	// To holds the forward-paths, at least one, like From without brackets or display names. The header of the message is
	// not looked at: who is to have a blind copy stands here and not there.
	To []string

	// Body writes the message as RFC 5322 has it: header, empty line, text. Bare CR and bare LF become CRLF on the way and
	// lines that begin with a dot are escaped, in constant memory. Nothing else is changed or added: no Date, no Message-ID;
	// 8-bit text goes to a relay without 8BITMIME too (MailOptions.Body can make that an error), and so do lines of more than
	// 998 octets, which some relays refuse (RFC 5321, 4.5.3.1.6). [Bytes] and [Reader] make one; a *mail.Msg of
	// wneessen/go-mail or a *gomail.Message is one.
	//
	// WriteTo may be called again for another try, from one goroutine at a time. A Body that is also an io.Reader, such as
	// a *bytes.Buffer, is used up by writing: a message whose Body was asked to write is not tried again, but for what
	// [Reader] says of CHUNKING. Its Read and its WriteTo must tell the same, as for io.Copy. If either fails, or there is
	// nothing at all to write, nothing is accepted by the relay.
	Body io.WriterTo

	// AllOrNothing sends the message to nobody if the relay refuses one of several recipients. By default those who were
	// accepted get it, and the error names the others.
	AllOrNothing bool

	// Urgent messages are sent before those that are not; of eight, one of the others still has its turn.
	Urgent bool

	// FailFast: where no connection is open and the relay cannot be reached, Send does not wait for it but returns the error of
	// the last attempt to connect. A Client whose connections work and are busy is waited for.
	FailFast bool

	// MailOptions are further parameters of the MAIL command; nil means none.
	MailOptions *MailOptions

	// RcptOptions are further parameters of the RCPT command, by address as it stands in To.
	RcptOptions map[string]*RcptOptions

	// BeforeEnd, if not nil, is called once for each transaction, when the body is written and before its end may leave: the
	// final dot, or BDAT 0 LAST. Until it returns nil the relay cannot have accepted the message; so a queue writes down
	// there, durably, that the message may have been sent from now on. to are the recipients of the transaction; a Send makes several
	// where recipients are split, and another one where a connection was lost. It is called in the goroutine of Send, and not
	// after Send has returned.
	//
	// An error closes the connection without the end: Send does not try again, and its error has [NotAccepted], Op [OpEnd],
	// [ScopeCaller] and the one of BeforeEnd in it, unless the relay has refused all recipients meanwhile. A connection stands still meanwhile, and nobody else can use it: ctx, that
	// of the Send, ends also when the connection is lost, and BeforeEnd should return then.
	BeforeEnd func(ctx context.Context, to []string) error

	// Tag is the caller's: a row's number, for example. It is not looked at, and is in the Message of each [Result] and of what
	// a [Trace] is told.
	Tag any
}

// Bytes returns a Body that writes b, which must not change until Send has returned.
func Bytes(b []byte) io.WriterTo { return conn.Bytes(b) }

// Reader returns a Body that copies r. It can be written once only: if a try fails after the body was begun, the message
// is not tried again. Where the relay offers CHUNKING (RFC 3030) up to 64 KiB are read before the relay is asked, and kept:
// there it is tried again until more than that was read.
func Reader(r io.Reader) io.WriterTo { return conn.Reader(r) }

// Receipt is what the relay said when it accepted a message.
type Receipt struct {
	// Reply is the relay's final reply as it came. Where recipients had to be split over several transactions it is that
	// of the last one accepted. Its Code is 0 where none was accepted.
	Reply Reply

	// QueueID is the identifier that the reply names, the only handle a relay gives for asking about the message later;
	// empty where none was recognised. It has at most 128 characters, of printable ASCII; the relay chooses them.
	QueueID string

	// Recipients tells each recipient's fate, in the envelope's order.
	Recipients []RecipientResult
}
