// Package smtpapi writes X-SMTPAPI, the header field that tells SendGrid what to do with a message.
//
//	h := smtpapi.Header{Category: []string{"orders"}, ASMGroupID: 42}
//	if err := h.Check(); err != nil { … } // every mistake at once
//	receipt, err := client.Send(ctx, smtprelay.Message{…, Body: smtpapi.Prepend(h, body)})
//
// The field holds one JSON object; [Header] is that object as a struct, where a zero field is left out. [Header.Marshal] returns
// the field, checked, escaped and folded; [Prepend] puts it in front of a message body. SendGrid reads the field only after it has
// accepted the message: it answers 250 even to a mistake, and later sends a bounce to MAIL FROM. Header therefore refuses what
// SendGrid's documents rule out, and somebody should read the mail to MAIL FROM.
//
// # Recipients
//
// [Header.To] takes the place of the envelope's recipients: SendGrid makes one message for each address, with that address
// alone in its To field. Give the relay one recipient in the envelope, such as your own address. An address in both places
// may get two copies, and the relay says nothing about the addresses in To: its 250 is for the message only.
//
// # Lines
//
// SendGrid asks for lines of at most 1,000 octets, with the line end, because servers on the way cut longer lines, which breaks the
// JSON. The field is folded at 78 octets where JSON allows white space, so that every unfolding yields the same JSON. Strings are
// never folded: a server may unfold to more, fewer or other white space than there was. A string that fits on no line, 996 octets
// in escaped form and with its quotes, is an error: such a text belongs in the message or in a template. Servers on the way may
// also limit a field as a whole (Postfix truncates at 102,400 octets, its header_size_limit); no such limit of SendGrid's own
// servers is known.
//
// # Sources
//
// Limits are those of SendGrid's pages Building an X-SMTPAPI Header, Scheduling Parameters, Unique Arguments, Categories,
// Substitution Tags, Section Tags, Suppression Groups and SMTP Filters, below
// https://www.twilio.com/docs/sendgrid/for-developers/sending-email; comments name the page. They do not say how bytes are
// counted: here they are the octets of names and values in UTF-8.
package smtpapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// Header is the content of an X-SMTPAPI field. The zero value asks for nothing. This package only reads it, so several goroutines
// may use one Header as long as none changes it.
type Header struct {
	// To holds the recipients in place of those of the envelope: at most 10,000; SendGrid advises about 1,000
	// (Building an X-SMTPAPI Header).
	To []string

	// Sub maps a tag to its replacement for each recipient: one value for each address in To, in that order, or for each
	// recipient of the envelope if To is empty. Tags have no white space in them. The tags and values of one recipient
	// have at most 50,000 bytes, and at most 4 substitutions are nested, though the page advises against nesting at all
	// (Substitution Tags). A value is replaced as it stands: escape it for HTML if the message is HTML.
	Sub map[string][]string

	// Section maps a tag to a text for all recipients, which may contain tags of Sub. Each tag must stand in a value of
	// Sub, and in no other section (Section Tags). SendGrid's page says that sections are deprecated and removed.
	Section map[string]string

	// Category holds at most 10 categories in US-ASCII, under which SendGrid keeps statistics. It advises about 100
	// different ones for an account (Categories).
	Category []string

	// UniqueArgs are returned with each event of the message: names and values have at most 10,000 bytes in all. SendGrid
	// does not treat them as private data (Unique Arguments).
	UniqueArgs map[string]string

	// Filters changes the account's settings for this message.
	Filters Filters

	// SendAt is when to send the message, at most 72 hours ahead, in whole seconds; zero means at once. It excludes
	// SendEachAt: SendGrid drops a message that has both (Scheduling Parameters).
	SendAt time.Time

	// SendEachAt is SendAt for each recipient, in the order of To.
	SendEachAt []time.Time

	// BatchID names the messages that can be cancelled together. SendGrid makes it on request; it is valid for 10 days
	// (Scheduling Parameters), which is not checked.
	BatchID string

	// ASMGroupID is the unsubscribe group that the message belongs to; 0 means none (Suppression Groups).
	ASMGroupID int

	// ASMGroupsToDisplay are the unsubscribe groups shown to the recipient who manages preferences: at most 25; none means
	// the account's default groups (Suppression Groups).
	ASMGroupsToDisplay []int

	// IPPool names the pool of addresses to send from (Building an X-SMTPAPI Header).
	IPPool string
}

// Marshal returns the whole header field with its name and its final CRLF: US-ASCII, folded, no line longer than 998 octets
// without its CRLF (RFC 5322, 2.1.1). The error is that of [Header.Check].
func (h Header) Marshal() ([]byte, error) { return h.AppendTo(nil) }

// AppendTo appends what [Header.Marshal] returns to b. If there is an error, it returns b unchanged.
func (h Header) AppendTo(b []byte) ([]byte, error) {
	if err := h.Check(); err != nil {
		return b, err
	}
	text, err := h.json()
	if err != nil {
		return b, fmt.Errorf("smtpapi: %w", err)
	}
	return appendFolded(b, text), nil
}

// json returns the compact JSON of h in ASCII.
func (h Header) json() ([]byte, error) {
	object := struct {
		To                 []string                  `json:"to,omitempty"`
		Sub                map[string][]string       `json:"sub,omitempty"`
		Section            map[string]string         `json:"section,omitempty"`
		Category           []string                  `json:"category,omitempty"`
		UniqueArgs         map[string]string         `json:"unique_args,omitempty"`
		Filters            map[string]filterSettings `json:"filters,omitempty"`
		SendAt             int64                     `json:"send_at,omitempty"`
		SendEachAt         []int64                   `json:"send_each_at,omitempty"`
		BatchID            string                    `json:"batch_id,omitempty"`
		ASMGroupID         int                       `json:"asm_group_id,omitempty"`
		ASMGroupsToDisplay []int                     `json:"asm_groups_to_display,omitempty"`
		IPPool             string                    `json:"ip_pool,omitempty"`
	}{
		To:                 h.To,
		Sub:                h.Sub,
		Section:            h.Section,
		Category:           h.Category,
		UniqueArgs:         h.UniqueArgs,
		Filters:            h.Filters.settings(),
		BatchID:            h.BatchID,
		ASMGroupID:         h.ASMGroupID,
		ASMGroupsToDisplay: h.ASMGroupsToDisplay,
		IPPool:             h.IPPool,
	}
	if !h.SendAt.IsZero() {
		object.SendAt = h.SendAt.Unix()
	}
	for _, at := range h.SendEachAt {
		object.SendEachAt = append(object.SendEachAt, at.Unix())
	}
	return marshalASCII(object)
}

// marshalASCII is json.Marshal in printable ASCII, without the escapes that are for HTML only.
func marshalASCII(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return escape(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}
