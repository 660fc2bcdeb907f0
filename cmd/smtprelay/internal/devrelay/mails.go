package devrelay

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

// searchText is how much of a message is searched, in octets: the addresses, the subject, and the beginning of the text.
const searchText = 4 << 10

// Mail is a message that was taken, as a list shows it. It does not change.
type Mail struct {
	ID          string    `json:"id"`         // the queue ID, as in the reply to the client
	Seq         uint64    `json:"seq"`        // counts up from 1, in the order of arrival
	Connection  int       `json:"connection"` // counted from 1
	From        string    `json:"from"`       // of the envelope, as is To
	To          []string  `json:"to"`
	Sender      string    `json:"sender"` // the From of the header
	Subject     string    `json:"subject"`
	Attachments int       `json:"attachments"`
	Size        int64     `json:"size"` // in octets
	Received    time.Time `json:"received"`

	body   []byte
	search string // in lower case
}

// cost is about how much memory the message takes, in octets.
func (m *Mail) cost() int64 {
	n := 512 + len(m.body) + len(m.search) + len(m.From) + len(m.Sender) + len(m.Subject)
	for _, to := range m.To {
		n += 16 + len(to)
	}
	return int64(n)
}

// A mailFilter says which messages are meant. What is empty lets all through.
type mailFilter struct {
	text    string // in lower case: somewhere in the message's search text
	subject string // in lower case: a part of the subject
	from    string // of the envelope
	to      string // one of the envelope
	after   uint64 // with a greater Seq
	conn    int
}

func (f *mailFilter) takes(m *Mail) bool {
	return m.Seq > f.after &&
		(f.conn == 0 || f.conn == m.Connection) &&
		(f.from == "" || strings.EqualFold(f.from, m.From)) &&
		(f.to == "" || slices.ContainsFunc(m.To, func(to string) bool { return strings.EqualFold(to, f.to) })) &&
		(f.subject == "" || strings.Contains(strings.ToLower(m.Subject), f.subject)) &&
		(f.text == "" || strings.Contains(m.search, f.text))
}

// mailbox keeps the latest messages, as many as keep and keepBytes allow.
type mailbox struct {
	keep      int
	keepBytes int64
	changed   func()
	grown     bell // rings when a message is added

	mu    sync.RWMutex // guards the fields below
	mails []*Mail      // by Seq
	byID  map[string]*Mail
	bytes int64
	last  uint64 // the Seq of the latest
	gone  uint64 // messages deleted so far; those dropped for newer ones are not counted
}

func newMailbox(keep int, keepBytes int64, changed func()) *mailbox {
	return &mailbox{keep: keep, keepBytes: keepBytes, changed: changed, byID: map[string]*Mail{}}
}

// add takes a message, and drops the oldest if there are too many.
func (b *mailbox) add(m smtptest.Message) {
	mail := &Mail{ID: m.ID, Connection: m.Conn, From: strings.Clone(m.From), Size: m.Size, Received: m.Received, body: m.Body}
	for _, to := range m.To {
		mail.To = append(mail.To, strings.Clone(to)) // a part of a command, which may have been long
	}
	mail.summarise()
	b.mu.Lock()
	b.last++
	mail.Seq = b.last
	b.mails = append(b.mails, mail)
	b.byID[mail.ID] = mail
	b.bytes += mail.cost()
	for len(b.mails) > b.keep || b.bytes > b.keepBytes && len(b.mails) > 1 {
		b.dropLocked(b.mails[0])
		b.mails[0] = nil
		b.mails = b.mails[1:]
	}
	b.mu.Unlock()
	b.grown.ring()
	b.changed()
}

// summarise fills in what is found in the message itself.
func (m *Mail) summarise() {
	p := parse(m.body, searchText)
	m.Sender, m.Subject, m.Attachments = shortLine(p.get("From")), shortLine(p.get("Subject")), len(p.Attachments)
	text := p.Text
	if text == "" {
		text = p.HTML
	}
	all := strings.Join([]string{m.Subject, m.Sender, m.From, p.get("To"), strings.Join(m.To, " "), m.ID, text}, "\n")
	if len(all) > searchText {
		all = strings.ToValidUTF8(all[:searchText], "")
	}
	m.search = strings.ToLower(all)
}

func (b *mailbox) dropLocked(m *Mail) {
	delete(b.byID, m.ID)
	b.bytes -= m.cost()
}

// get returns the message with the queue ID, or nil.
func (b *mailbox) get(id string) *Mail {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.byID[id]
}

// A mailPage is a part of the list, the latest first.
type mailPage struct {
	Messages []*Mail `json:"messages"`
	Found    int     `json:"found"` // how many pass the filter
	Total    int     `json:"total"` // how many are kept
	First    uint64  `json:"first"` // the Seq of the oldest that is kept
	Last     uint64  `json:"last"`  // the Seq of the latest that was taken, whether it is kept or not
	Gone     uint64  `json:"gone"`  // how many were deleted since the relay was started
	More     bool    `json:"more"`  // there are older ones: ask for those before the last of Messages
}

// page returns the latest limit of the messages that pass the filter and, unless before is 0, have a lesser Seq.
func (b *mailbox) page(f mailFilter, before uint64, limit int) mailPage {
	b.mu.RLock()
	defer b.mu.RUnlock()
	p := mailPage{Messages: []*Mail{}, Total: len(b.mails), First: b.last + 1, Last: b.last, Gone: b.gone}
	if p.Total > 0 {
		p.First = b.mails[0].Seq
	}
	if f == (mailFilter{}) {
		p.Found = p.Total
	}
	for _, m := range slices.Backward(b.mails) {
		switch {
		case m.Seq <= f.after:
			return p // and so are all others
		case !f.takes(m):
			continue
		}
		if f != (mailFilter{}) {
			p.Found++
		}
		if before != 0 && m.Seq >= before {
			continue
		}
		if len(p.Messages) < limit {
			p.Messages = append(p.Messages, m)
			continue
		}
		p.More = true
		if f == (mailFilter{}) {
			return p // nothing is left to count
		}
	}
	return p
}

// wait waits until n messages pass the filter, and returns the page of them. If ctx ends first, it returns what there is, and
// the error of ctx.
func (b *mailbox) wait(ctx context.Context, f mailFilter, n, limit int) (mailPage, error) {
	for {
		grown := b.grown.heard()
		p := b.page(f, 0, limit)
		if p.Found >= n {
			return p, nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return p, ctx.Err()
		}
	}
}

// remove deletes the messages that pass the filter, and returns how many.
func (b *mailbox) remove(takes func(*Mail) bool) int {
	b.mu.Lock()
	before := len(b.mails)
	b.mails = slices.DeleteFunc(b.mails, func(m *Mail) bool {
		if !takes(m) {
			return false
		}
		b.dropLocked(m)
		return true
	})
	n := before - len(b.mails)
	b.gone += uint64(n)
	b.mu.Unlock()
	b.changed()
	return n
}
