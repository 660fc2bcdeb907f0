package smtprelay

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// fit adapts d.msg to the extensions that the relay offers on s: the parameters of MAIL, and the recipients of the next
// transaction. It returns these recipients, none if s can take no more domains. It fails, before anything is written, if the
// relay lacks an extension that the message needs.
func (d *delivery) fit(s *session) (rcpts []int, err *Error) {
	ext := s.Extensions()
	d.sift(ext)
	lacks := cmp.Or(d.lacks(ext), d.lacksTLS(s), d.lacksForDelivery(ext), d.lacksForRcpts(ext))
	if lacks != nil {
		return nil, lacks
	}
	most := d.mostRcpts(ext)
	if limit := ext.Limits.RcptDomainMax; limit > 0 {
		fresh := len(s.domains) == 0
		if n := s.admitDomains(d.m.To, d.todo[:most], limit); n < most {
			most = n
			if !fresh {
				most = 0 // a fresh session has room for more of the domains
			}
		}
	}
	if d.m.AllOrNothing && most < len(d.todo) && most > 0 {
		return nil, unfit("AllOrNothing: %d recipients, and the relay takes %d in one transaction", len(d.todo), most)
	}
	if most < len(d.todo) && most > 0 && conn.OneShot(d.msg.Body) && !(d.c.cfg.Chunking && ext.Has("CHUNKING")) { // with chunks the body is read ahead
		return nil, unfit("%d recipients, and %d go into one transaction; %w", len(d.todo), most, errBodyOnce)
	}
	mail := d.params(ext)
	d.msg.Mail, d.msg.Rcpts = mail.params(), d.todo[:most]
	return d.msg.Rcpts, nil
}

// params returns the parameters of MAIL for a relay that offers ext. Optional parameters are added if the relay offers their
// extension, and left out otherwise.
func (d *delivery) params(ext *wire.Extensions) MailOptions {
	mail := d.mail
	switch {
	case mail.Body == "" && ext.Has("8BITMIME"):
		mail.Body = Body8BitMIME
	case mail.Body == Body7Bit && !ext.Has("8BITMIME"):
		mail.Body = ""
	}
	if mail.Size == 0 {
		mail.Size = d.msg.Size
	}
	if !ext.Has("SIZE") {
		mail.Size = 0
	}
	if d.utf8 != "" {
		mail.UTF8 = true
	}
	if !ext.Has("AUTH") {
		mail.Auth = nil // optional (RFC 4954, 5)
	}
	return mail
}

// unfit returns the error of a message that the relay cannot take.
func unfit(format string, args ...any) *Error {
	return &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, permanent: true, Err: fmt.Errorf(format, args...)}
}

// notOffered returns the error of a message that needs an extension which the relay does not offer.
func notOffered(keyword, what string) *Error {
	return unfit("%s: the relay does not offer %s", what, keyword)
}

// notASCII returns the error of an address that needs SMTPUTF8, which the relay does not offer.
func notASCII(addr string) *Error {
	cure := "another relay has to take it"
	if isASCII(addr[:max(strings.LastIndexByte(addr, '@'), 0)]) {
		cure = "write its domain in the xn-- form (RFC 5891)"
	}
	return unfit("address %s is not ASCII: the relay does not offer SMTPUTF8; %s", printable.Address(addr), cure)
}

// sift removes the recipients from d.todo whose RCPT needs an extension that the relay does not offer, so that the others get
// the message. With AllOrNothing, or if no recipient would be left, sift removes none, and the message as a whole fails.
func (d *delivery) sift(ext *wire.Extensions) {
	if d.m.AllOrNothing || len(d.todo) < 2 || d.lacksForRcpts(ext) == nil && (d.utf8 == "" || ext.Has("SMTPUTF8")) {
		return
	}
	var fit []int
	for _, i := range d.todo {
		if d.lacksForRcpt(ext, d.m.To[i]) == nil {
			fit = append(fit, i)
		}
	}
	if len(fit) == 0 || !ext.Has("SMTPUTF8") && !isASCII(d.m.From) {
		return
	}
	for _, i := range d.todo {
		if e := d.lacksForRcpt(ext, d.m.To[i]); e != nil {
			d.receipt.Recipients[i].Err = e.Err
			if d.refusal == nil {
				d.refusal = e
				e.permanent = false // each recipient has its own error
			}
		}
	}
	d.todo = fit
	if !ext.Has("SMTPUTF8") {
		d.utf8 = ""
	}
	if !ext.Has("DSN") {
		d.dsnFor = ""
	}
	if !ext.Has("RRVS") {
		d.rrvsFor = ""
	}
}

// lacksForRcpt returns an error if recipient to needs an extension that the relay does not offer.
func (d *delivery) lacksForRcpt(ext *wire.Extensions, to string) *Error {
	o := d.m.RcptOptions[to]
	switch {
	case !isASCII(to) && !ext.Has("SMTPUTF8"):
		return notASCII(to)
	case o.needsDSN() && !ext.Has("DSN"):
		return rcptNotOffered("DSN", to, "Notify, OriginalRecipient")
	case o.needsRRVS() && !ext.Has("RRVS"):
		return rcptNotOffered("RRVS", to, "RequireRecipientValidSince")
	}
	return nil
}

// lacks returns an error if the message or its options need an extension that the relay does not offer.
func (d *delivery) lacks(ext *wire.Extensions) *Error {
	mail := &d.mail
	size := mail.Size
	if size == 0 {
		size = d.msg.Size
	}
	dsn := ext.Has("DSN")
	utf8 := ext.Has("SMTPUTF8")
	switch {
	case mail.Body != "" && mail.Body != Body7Bit && !ext.Has("8BITMIME"):
		return notOffered("8BITMIME", "MailOptions.Body "+string(mail.Body))
	case ext.Size > 0 && size > ext.Size:
		return unfit("%w", &conn.SizeError{Limit: ext.Size})
	case d.utf8 != "" && !utf8:
		return notASCII(d.utf8)
	case mail.UTF8 && !utf8:
		return notOffered("SMTPUTF8", "MailOptions.UTF8")
	case mail.Return != "" && !dsn:
		return notOffered("DSN", "MailOptions.Return")
	case mail.EnvelopeID != "" && !dsn:
		return notOffered("DSN", "MailOptions.EnvelopeID")
	}
	return nil
}

// lacksTLS is like lacks, for RequireTLS (RFC 8689).
func (d *delivery) lacksTLS(s *session) *Error {
	switch {
	case !d.mail.RequireTLS:
	case s.TLS() == nil:
		return unfit("MailOptions.RequireTLS: the connection is in the clear")
	case !d.c.cfg.verifies():
		return unfit("MailOptions.RequireTLS: TLSConfig says that the relay's certificate is not verified (RFC 8689, 2)")
	case !s.Extensions().Has("REQUIRETLS"):
		return notOffered("REQUIRETLS", "MailOptions.RequireTLS")
	}
	return nil
}

// lacksForDelivery is like lacks, for DeliverBy (RFC 2852) and Priority (RFC 6710).
func (d *delivery) lacksForDelivery(ext *wire.Extensions) *Error {
	by := d.mail.DeliverBy
	switch {
	case by != nil && !ext.Has("DELIVERBY"):
		return notOffered("DELIVERBY", "MailOptions.DeliverBy")
	case by != nil && by.Mode == DeliverByReturn && by.seconds() < ext.DeliverBy:
		return unfit("MailOptions.DeliverBy: the relay wants %d seconds at least (DELIVERBY)", ext.DeliverBy)
	case d.mail.Priority != nil && !ext.Has("MT-PRIORITY"):
		return notOffered("MT-PRIORITY", "MailOptions.Priority")
	}
	return nil
}

// lacksForRcpts is like lacks, for RcptOptions.
func (d *delivery) lacksForRcpts(ext *wire.Extensions) *Error {
	switch {
	case d.dsnFor != "" && !ext.Has("DSN"):
		return rcptNotOffered("DSN", d.dsnFor, "Notify, OriginalRecipient")
	case d.rrvsFor != "" && !ext.Has("RRVS"):
		return rcptNotOffered("RRVS", d.rrvsFor, "RequireRecipientValidSince")
	}
	return nil
}

func rcptNotOffered(keyword, to, options string) *Error {
	return notOffered(keyword, fmt.Sprintf("RcptOptions of %s: %s", printable.Address(to), options))
}

// mostRcpts returns how many of d.todo go into one transaction, limited by the settings, the relay's EHLO and its profile.
func (d *delivery) mostRcpts(ext *wire.Extensions) int {
	most := len(d.todo)
	for _, limit := range []int{d.c.cfg.Limits.MaxRecipients, ext.Limits.RcptMax} {
		if limit > 0 {
			most = min(most, limit)
		}
	}
	if d.m.AllOrNothing || conn.OneShot(d.msg.Body) {
		return most
	}
	if limit := d.c.cfg.split; limit > 0 {
		most = min(most, limit)
	}
	return d.rcpts.offer(most)
}

// admitDomains returns how many of rcpts fit before the session exceeds limit different domains (RFC 9422, 4.3). It adds their
// domains to s.domains.
func (s *session) admitDomains(to []string, rcpts []int, limit int) (n int) {
	if s.domains == nil {
		s.domains = make(map[string]struct{})
	}
	for _, i := range rcpts {
		domain := strings.ToLower(to[i][strings.LastIndexByte(to[i], '@')+1:])
		if _, known := s.domains[domain]; !known {
			if len(s.domains) >= limit {
				return n
			}
			s.domains[domain] = struct{}{}
		}
		n++
	}
	return n
}
