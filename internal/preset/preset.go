// Package preset is the table of well-known relays for the public package preset and for smtprelay.ParseURL. A number is in the
// table only if the relay's documentation, or a report, gives it; otherwise the Client's defaults apply.
package preset

import (
	"fmt"
	"slices"
	"strings"
)

// Relay is one relay, or one of its hosts.
type Relay struct {
	Scheme string   // scheme of its URL
	Host   string   // contains Region if the relay has a host for each region
	Port   string   // a port with STARTTLS; Mailpit may be without TLS
	Others []string // further hosts, by the word that selects them in a URL: "eu=smtp.eu.…"

	Username   string // user name shared by all accounts; "" if each account has its own
	WhoAreYou  string // description of the user name, if each account has its own; "" and no Username: none is needed
	TokenTwice bool   // the user name is the password

	MaxConns, MaxMessagesPerConn, MaxRecipients int // for Limits; 0: not documented
}

// Region is the placeholder in Host for the caller's region.
const Region = "<region>"

// Relays lists all relays, in the order of the README's table.
var Relays = []Relay{
	// Host, ports and user name: "Integrating with the SMTP API". EU host: Symfony's SendGrid transport. 10 connections and 100
	// messages: the Laravel page and the older "Integrate" page; since 2020 the first page says 10,000 and 5,000.
	// 1,000 recipients: the older page.
	{Scheme: "sendgrid", Host: "smtp.sendgrid.net", Port: "587", Others: []string{"eu=smtp.eu.sendgrid.net"},
		Username: "apikey", MaxConns: 10, MaxMessagesPerConn: 100, MaxRecipients: 1000},
	// "Connecting to an SES SMTP endpoint"; 50 recipients: "Service quotas in Amazon SES". Connections and messages on each
	// are not published.
	{Scheme: "ses", Host: "email-smtp." + Region + ".amazonaws.com", Port: "587",
		WhoAreYou: "the SMTP user name made for SES", MaxRecipients: 50},
	// Hosts: guides of Spree and UMBHost; "Sending messages". No limits are published.
	{Scheme: "mailgun", Host: "smtp.mailgun.org", Port: "587", Others: []string{"eu=smtp.eu.mailgun.org"},
		WhoAreYou: "postmaster@DOMAIN or another login of the domain"},
	// "SMTP details"; 10 connections are advised and 50 recipients allowed: "SMTP rate limits", as recorded by API Evangelist.
	{Scheme: "postmark", Host: "smtp.postmarkapp.com", Port: "587", Others: []string{"broadcasts=smtp-broadcasts.postmarkapp.com"},
		TokenTwice: true, MaxConns: 10, MaxRecipients: 50},
	// Host: the guide of smtptester.org. No limits were found.
	{Scheme: "mailjet", Host: "in-v3.mailjet.com", Port: "587", WhoAreYou: "the API key"},
	// "SMTP relay integration"; the host from guides. No limits were found.
	{Scheme: "brevo", Host: "smtp-relay.brevo.com", Port: "587", WhoAreYou: "the SMTP login"},
	// "Send with SMTP". The limit of 5 requests a second is written for the API.
	{Scheme: "resend", Host: "smtp.resend.com", Port: "587", Username: "resend"},
	// "SMTP API", which advises 100 messages on a connection.
	{Scheme: "sparkpost", Host: "smtp.sparkpostmail.com", Port: "587", Others: []string{"eu=smtp.eu.sparkpostmail.com"},
		Username: "SMTP_Injection", MaxMessagesPerConn: 100},
	// "Sending limits": 10 connections for an account and for an address, 100 messages on each.
	{Scheme: "mailtrap", Host: "live.smtp.mailtrap.io", Port: "587", Username: "api", MaxConns: 10, MaxMessagesPerConn: 100},
	// "Gmail IMAP, POP and SMTP". No limits of connections were found.
	{Scheme: "gmail", Host: "smtp.gmail.com", Port: "587", WhoAreYou: "the full address"},
	// "SMTP submission improvements": 3 connections for a mailbox.
	{Scheme: "microsoft365", Host: "smtp.office365.com", Port: "587", WhoAreYou: "the mailbox", MaxConns: 3},
	// Mailpit's README: its SMTP server listens on port 1025, and takes mail without authentication.
	{Scheme: "mailpit", Host: "localhost", Port: "1025"},
}

// ByScheme returns the relay with the given URL scheme.
func ByScheme(scheme string) (Relay, bool) {
	i := slices.IndexFunc(Relays, func(r Relay) bool { return r.Scheme == scheme })
	if i < 0 {
		return Relay{}, false
	}
	return Relays[i], true
}

// Schemes returns the schemes of all relays.
func Schemes() []string {
	schemes := make([]string, len(Relays))
	for i, r := range Relays {
		schemes[i] = r.Scheme
	}
	return schemes
}

// At returns the host that word selects: a region, a word of Others, or "" for the default host. A Mailpit may have any host.
func (r *Relay) At(word string) (host string, err error) {
	if strings.Contains(r.Host, Region) {
		if !isRegion(word) {
			return "", fmt.Errorf("%s needs its region in the place of the host, such as eu-west-1", r.Scheme)
		}
		return strings.Replace(r.Host, Region, word, 1), nil
	}
	if word == "" || word == r.Host {
		return r.Host, nil
	}
	words := []string{"nothing"}
	for _, other := range r.Others {
		name, host, _ := strings.Cut(other, "=")
		if word == name || word == host {
			return host, nil
		}
		words = append(words, fmt.Sprintf("%q", name))
	}
	if r.Scheme == "mailpit" {
		return word, nil
	}
	return "", fmt.Errorf("%s has no such host: want %s", r.Scheme, strings.Join(words, " or ")) // do not quote word: it may be a misplaced key
}

// isRegion reports whether s can be one label of a host's name.
func isRegion(s string) bool {
	for _, c := range []byte(s) {
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-'
}
