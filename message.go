package smtprelay

import (
	"context"
	"io"

	"github.com/smtprelay/smtprelay/internal/body"
)

// NullSender in Message.From is the empty envelope sender, "<>" (RFC 5321, 4.5.5). Use it for bounces and automatic replies, for which
// no relay shall send a bounce.
const NullSender = "<>"

// Message is a mail and its envelope. Send does not change it, so that it may be sent again. Printing it, with any verb or through
// log/slog, shows the envelope and never the body.
type Message struct {
	// From is the envelope sender (Return-Path), to which relays send bounces: a bare address such as "shop@example.com", or
	// [NullSender]. Empty is an error. It has at most 254 bytes, 64 of them before the @ (RFC 5321, 4.5.3.1). Angle brackets, control
	// characters and invisible characters are errors, in a quoted local part too: a relay with a simple parser could read a parameter
	// or another address in them. See [ParseAddresses] for addresses with names.
	From string

	// To lists the envelope recipients, at least one, as bare addresses under the same rules as From. Everybody in To gets the
	// message, whatever its header says: put a Bcc recipient here and leave it out of the header.
	To []string

	// Body writes the mail as RFC 5322 has it: header, empty line, text. [Bytes], [BodyFunc] and [Reader] make one; a *mail.Msg of
	// wneessen/go-mail and a *gomail.Message are one. It may be of any size: it passes in constant memory.
	//
	// The Client turns bare CR and bare LF into CRLF and escapes lines that begin with a dot. It changes and adds nothing else: no Date,
	// no Message-ID. It sends 8-bit text to a relay without 8BITMIME too (MailOptions.Body can make that an error), and lines of more
	// than 998 bytes, which some relays refuse (RFC 5321, 4.5.3.1.6).
	//
	// WriteTo is called again for each try, from one goroutine at a time. A Body that is also an io.Reader is treated as [Reader]
	// treats it: one that can seek, and a *bytes.Buffer, can be written again; any other only once. Its Read and its WriteTo must
	// give the same bytes. If the Body returns an error or writes nothing at all, the relay accepts nothing.
	Body io.WriterTo

	// AllOrNothing sends the message to nobody if the relay refuses one of its recipients. By default the accepted recipients get it
	// and the error names the others. It needs one transaction: more recipients than the relay takes in one are an error. With several
	// recipients it costs one round trip more.
	AllOrNothing bool

	// Urgent messages are served before others that wait for a connection. One in eight turns still goes to the others.
	Urgent bool

	// FailFast makes Send return the error of the last attempt to connect where no connection works and the relay cannot be reached.
	// By default Send waits, up to Timeouts.Outage. A Client whose connections work but are busy is waited for in any case.
	FailFast bool

	// MailOptions are parameters of the MAIL command: delivery status notifications, REQUIRETLS and others. nil means none.
	MailOptions *MailOptions

	// RcptOptions are parameters of the RCPT command, by address as it is written in To. An address that is not in To is an error.
	RcptOptions map[string]*RcptOptions

	// BeforeEnd, if not nil, is called when the body is written and before its end leaves: the final dot, or BDAT 0 LAST. The relay
	// cannot accept the message before BeforeEnd has returned nil. A queue records there, durably, that the message may be sent from
	// now on. to lists the recipients of the transaction. Send calls BeforeEnd once per transaction: several times where it splits the
	// recipients, and again where it retries. It calls it in its own goroutine and never after it has returned.
	//
	// Nobody else can use the connection meanwhile, so BeforeEnd should be quick. Its ctx is derived from that of Send and also ends
	// when the connection is lost; BeforeEnd should return then.
	//
	// An error from BeforeEnd closes the connection without the end of the message, and Send does not retry. The error of Send wraps
	// it and has [NotAccepted], Op [OpEnd] and [ScopeCaller]; if the relay has refused all recipients meanwhile, it is that refusal.
	BeforeEnd func(ctx context.Context, to []string) error

	// Tag is a value of yours, such as the key of a database row. The Client does not look at it. You find it in the Message of a
	// [Result] and of a [Trace]'s Infos.
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

// Receipt is what the relay said about a message that it accepted, for some recipients at least. Send also returns one with an error:
// its Recipients are then those of the Error.
type Receipt struct {
	// Reply is the relay's reply to the end of the message. Where the recipients were split over several transactions it is that of
	// the last transaction accepted. Its Code is 0 where none was accepted.
	Reply Reply

	// QueueID is the relay's identifier of the message, found in Reply: what to name when you ask the relay's operator about the
	// message. It is empty where none was recognised. It is chosen by the relay: at most 128 characters of printable ASCII.
	QueueID string

	// Recipients tells what became of the message for each recipient, in the order of Message.To.
	Recipients []RecipientResult
}
