package smtprelay

import (
	"io"

	"github.com/smtprelay/smtprelay/internal/body"
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
	// WriteTo is called again for each try, from one goroutine at a time. A Body that is also an io.Reader is treated as [Reader]
	// treats it: one that can seek, and a *bytes.Buffer, can be written again; any other only once. Its Read and its WriteTo must
	// give the same bytes. If the Body returns an error or writes nothing at all, the relay accepts nothing.
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

	// Tag is the caller's: a row's number, for example. It is not looked at, and is in the Message of each [Result] and of what
	// a [Trace] is told.
	Tag any
}

// Bytes returns a Body that writes b. b must not change until Send has returned. Its size is declared to a relay that offers SIZE
// (RFC 1870).
func Bytes(b []byte) io.WriterTo { return body.Bytes(b) }

// BodyFunc returns a Body that f writes, for text that is made on the way: a template or an archive. f runs again for each try, and
// for each transaction where the recipients are split over several, from one goroutine at a time, and must write the same each
// time. An error of f ends the Send: the relay accepts nothing, and the error is found by errors.Is. f must not use w once it has
// returned. BodyFunc(nil) is nil, which Send refuses.
func BodyFunc(f func(w io.Writer) error) io.WriterTo {
	if f == nil {
		return nil
	}
	return body.Func(f)
}

// Reader returns a Body that copies r from where r stands when Send is called.
//
// An r that can seek (*os.File, *bytes.Reader, *strings.Reader, any io.Seeker whose Seek succeeds) is read again from there for each
// try, and stands there again when Send returns. A *bytes.Buffer is read in place and is not emptied. Such an r must not change until
// Send has returned. Files and readers in memory may be shared by messages that are sent at the same time; another io.Seeker may not.
//
// Any other r, such as a pipe or the body of an HTTP request, can be read once only: if a try fails after the first read, the message
// is not tried again and the error says so. For the same reason a message is refused whose recipients do not fit into one
// transaction. With Config.Chunking and a relay that offers CHUNKING (RFC 3030), up to 64 KiB are read before the relay is asked, and
// kept: there the message is tried again until more than that was read.
func Reader(r io.Reader) io.WriterTo { return body.Reader(r) }

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
