package smtprelay

import (
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// MailOptions are parameters of the MAIL command, which hold for the message as a whole. A zero field leaves its parameter
// out. A parameter out of its range, or one of an extension that the relay does not offer, is an error before anything
// is sent.
type MailOptions struct {
	// Body says what octets the message consists of (RFC 6152). Empty means 8BITMIME where the relay offers it, and no
	// word about it elsewhere.
	Body BodyType

	// Size is the size that is declared to the relay, in octets (RFC 1870); it cannot be negative. It is left out where the
	// relay does not offer SIZE. 0 means the size of the message where that is known, as of [Bytes].
	Size int64

	// RequireTLS asks every relay on the way to pass the message on over verified TLS, or not at all (RFC 8689).
	// It is an error on a connection in the clear or with a certificate that is not verified.
	RequireTLS bool

	// UTF8 says that the header has UTF-8 in it (RFC 6531). It is set by itself where an address is not ASCII.
	UTF8 bool

	// Return says how much of the message a delivery status notification returns (RFC 3461, 4.3). Empty leaves that to
	// the relay.
	Return DSNReturn

	// EnvelopeID is returned in a delivery status notification (RFC 3461, 4.4): at most 100 printable ASCII characters.
	EnvelopeID string

	// Auth is the address of whoever submitted the message first, without angle brackets (RFC 4954, 5). It points to ""
	// where that is not known. It is left out where the relay does not offer AUTH.
	Auth *string

	// DeliverBy is by when the message is to be delivered (RFC 2852).
	DeliverBy *DeliverBy

	// Priority is how the message ranks with the relays on its way, from -9, the lowest, to 9 (RFC 6710).
	Priority *int
}

// BodyType is the value of BODY= (RFC 6152, RFC 3030).
type BodyType string

const (
	Body7Bit       BodyType = "7BIT"
	Body8BitMIME   BodyType = "8BITMIME"
	BodyBinaryMIME BodyType = "BINARYMIME" // an error: line ends are normalised, so that a message is always sent as text
)

// DSNReturn is the value of RET= (RFC 3461, 4.3).
type DSNReturn string

const (
	DSNReturnFull    DSNReturn = "FULL" // the whole message
	DSNReturnHeaders DSNReturn = "HDRS" // its header only
)

// DeliverBy is the value of BY= (RFC 2852, 4).
type DeliverBy struct {
	// Time is counted from now, in whole seconds: a fraction is dropped. It has at most nine digits of seconds. With
	// DeliverByReturn it must be a second at least, and no less than the relay asks for in its reply to EHLO; with
	// DeliverByNotify it may be negative.
	Time time.Duration

	// Mode says what happens when Time is over.
	Mode DeliverByMode

	// Trace asks each relay for a notification when it passes the message on.
	Trace bool
}

// DeliverByMode is what happens to a message that is not delivered in time (RFC 2852, 4).
type DeliverByMode string

const (
	DeliverByNotify DeliverByMode = "N" // the sender is notified, and delivery goes on
	DeliverByReturn DeliverByMode = "R" // the message is returned to the sender
)

// RcptOptions are parameters of the RCPT command, which hold for one recipient. A zero field leaves its parameter out.
// A parameter out of its range is an error before anything is sent. One of an extension that the relay does not offer refuses
// its recipient ([RecipientError.Err]), and the message where it can be sent to nobody else or is for all or nobody.
type RcptOptions struct {
	// Notify are the events for which the sender gets a delivery status notification (RFC 3461, 4.1): DSNNotifyNever
	// alone, or any of the others. Empty leaves that to the relay, which notifies of failures.
	Notify []DSNNotify

	// OriginalRecipient is the address that the message was sent to first (RFC 3461, 4.2): at most 500 octets; printable
	// ASCII, or UTF-8 (RFC 6533) where OriginalRecipientType is DSNAddressTypeUTF8. An empty type means
	// DSNAddressTypeRFC822.
	OriginalRecipientType DSNAddressType
	OriginalRecipient     string

	// RequireRecipientValidSince has the message delivered only if the mailbox has belonged to the same person since then
	// (RFC 7293). It is told in whole seconds, in UTC, and its year is from 1 to 9999.
	RequireRecipientValidSince time.Time
}

// DSNNotify is one of the values of NOTIFY= (RFC 3461, 4.1).
type DSNNotify string

const (
	DSNNotifyNever   DSNNotify = "NEVER"
	DSNNotifyDelayed DSNNotify = "DELAY"
	DSNNotifyFailure DSNNotify = "FAILURE"
	DSNNotifySuccess DSNNotify = "SUCCESS"
)

// DSNAddressType is the type of an address in ORCPT= (RFC 3461, 4.2; RFC 6533, 3).
type DSNAddressType string

const (
	DSNAddressTypeRFC822 DSNAddressType = "RFC822"
	DSNAddressTypeUTF8   DSNAddressType = "UTF-8"
)

// params are the parameters of MAIL as they are written.
func (o *MailOptions) params() wire.MailParams {
	p := wire.MailParams{Body: string(o.Body), Size: o.Size, UTF8: o.UTF8, Return: string(o.Return), EnvelopeID: o.EnvelopeID,
		RequireTLS: o.RequireTLS, Auth: o.Auth, Priority: o.Priority}
	if by := o.DeliverBy; by != nil {
		p.By = wire.By{Mode: string(by.Mode), Seconds: by.seconds(), Trace: by.Trace}
	}
	return p
}

// params are the parameters of RCPT as they are written. o may be nil.
func (o *RcptOptions) params() (p wire.RcptParams) {
	if o == nil {
		return p
	}
	p = wire.RcptParams{OrcptAs: string(o.OriginalRecipientType), Orcpt: o.OriginalRecipient, Since: o.RequireRecipientValidSince}
	for _, n := range o.Notify {
		p.Notify = append(p.Notify, string(n))
	}
	return p
}

// needsDSN and needsRRVS report whether o needs the extension. o may be nil.
func (o *RcptOptions) needsDSN() bool {
	return o != nil && (len(o.Notify) > 0 || o.OriginalRecipient != "")
}

func (o *RcptOptions) needsRRVS() bool { return o != nil && !o.RequireRecipientValidSince.IsZero() }

func (by *DeliverBy) seconds() int64 { return int64(by.Time / time.Second) }
