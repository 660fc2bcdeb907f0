package smtprelay

import (
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// MailOptions are parameters of the MAIL command, which apply to the message as a whole. A zero field leaves its parameter out. A value
// out of range is an error of the Send, and so is an option whose extension the relay does not offer, unless the field says otherwise.
// In both cases nothing is sent.
type MailOptions struct {
	// Body declares what bytes the message consists of (RFC 6152). Empty means 8BITMIME where the relay offers it, and no declaration
	// elsewhere.
	Body BodyType

	// Size is the size in bytes that is declared to the relay (RFC 1870). It must not be negative. 0 means the size of the message where
	// that is known beforehand, as for [Bytes]. It is left out where the relay does not offer SIZE.
	Size int64

	// RequireTLS asks every relay on the way to pass the message on over verified TLS or not at all (RFC 8689). It is an error on a
	// connection without TLS or where TLSConfig turns verification off.
	RequireTLS bool

	// UTF8 declares that the header contains UTF-8 (RFC 6531). The Client sets it where an envelope address is not ASCII.
	UTF8 bool

	// Return says how much of the message a delivery status notification contains (RFC 3461, 4.3). Empty means the relay's choice.
	Return DSNReturn

	// EnvelopeID is repeated in delivery status notifications (RFC 3461, 4.4), so that you know which message they are about. It has at
	// most 100 printable ASCII characters.
	EnvelopeID string

	// Auth points to the address of whoever submitted the message first, without angle brackets (RFC 4954, 5), or to "" if that is not
	// known. nil leaves it out. It is also left out where the relay does not offer AUTH.
	Auth *string

	// DeliverBy is a time limit for the delivery (RFC 2852); nil means none.
	DeliverBy *DeliverBy

	// Priority points to the message's priority for the relays on its way, from -9, the lowest, to 9 (RFC 6710); nil means none. For the
	// order within this Client see Message.Urgent.
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
	// Time is the limit, counted from when the message is sent, in whole seconds: a fraction is dropped. It is at most 999,999,999
	// seconds. With DeliverByReturn it is at least one second, and at least the minimum in the relay's EHLO reply. With
	// DeliverByNotify it may be negative.
	Time time.Duration

	// Mode says what happens when Time is over. It must be set.
	Mode DeliverByMode

	// Trace asks every relay for a notification when it passes the message on.
	Trace bool
}

// DeliverByMode is what happens to a message that is not delivered in time (RFC 2852, 4).
type DeliverByMode string

const (
	DeliverByNotify DeliverByMode = "N" // the sender is notified, and delivery goes on
	DeliverByReturn DeliverByMode = "R" // the message is returned to the sender
)

// RcptOptions are parameters of the RCPT command, which apply to one recipient. A zero field leaves its parameter out. A value out of
// range is an error of the Send, and nothing is sent. Where the relay does not offer the extension of an option, the message is not sent
// to that recipient (RecipientResult.Err says why); it is sent to nobody if there is no other recipient or AllOrNothing is set.
type RcptOptions struct {
	// Notify lists the events for which the sender gets a delivery status notification (RFC 3461, 4.1): DSNNotifyNever alone, or any of
	// the others. Empty means the relay's choice, which is to notify of failures.
	Notify []DSNNotify

	// OriginalRecipient is the address to which the message was sent first (RFC 3461, 4.2): at most 500 bytes of printable ASCII, or of
	// UTF-8 (RFC 6533) with the type DSNAddressTypeUTF8. An empty type means DSNAddressTypeRFC822.
	OriginalRecipientType DSNAddressType
	OriginalRecipient     string

	// RequireRecipientValidSince has the message delivered only if the mailbox has had the same owner since then (RFC 7293). It is sent
	// in UTC with whole seconds. Its year is from 1 to 9999.
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
