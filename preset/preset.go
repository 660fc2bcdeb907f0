// Package preset has a [smtprelay.Config] for each well-known relay. You add only the credentials:
//
//	client, err := smtprelay.New(preset.SendGrid(os.Getenv("SENDGRID_API_KEY")))
//
// A preset is the relay's host and port, its convention for the user name, and the limits that it documents; what it does not
// document has the Client's defaults, and the Client learns from the relay's replies. TLS is required, except by Mailpit. You may
// change the Config before New: a port of implicit TLS, more connections, a Name.
//
// [smtprelay.ParseURL] takes the same relays as schemes, with the secret where url.URL.Redacted hides it:
//
//	sendgrid://:KEY@                  sendgrid://:KEY@eu
//	ses://USER:PASSWORD@eu-west-1     mailgun://postmaster%40DOMAIN:PASSWORD@eu
//	postmark://:TOKEN@                postmark://:TOKEN@broadcasts
//	mailjet://KEY:SECRET@             brevo://LOGIN:KEY@
//	resend://:KEY@                    sparkpost://:KEY@eu
//	mailtrap://:TOKEN@                gmail://ADDRESS:PASSWORD@
//	microsoft365://MAILBOX:PASSWORD@  mailpit://
//
// The figures are from the relays' documentation and from reports as of 2026-11; the comments of the table in the source name
// them. Where several processes share a relay's allowance, divide it.
package preset

import (
	"context"
	"net"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/preset"
)

// config is the relay with that scheme at the host that word chooses.
func config(scheme, word, username, password string) smtprelay.Config {
	r, _ := preset.ByScheme(scheme)
	host, err := r.At(word)
	if err != nil {
		host = r.Host // with <region> in it, which no name server knows and every error shows
	}
	switch {
	case r.TokenTwice:
		username = password
	case username == "":
		username = r.Username
	}
	return smtprelay.Config{
		Addr: net.JoinHostPort(host, r.Port), Username: username, Password: password,
		Limits: smtprelay.Limits{MaxConns: r.MaxConns, MaxMessagesPerConn: r.MaxMessagesPerConn, MaxRecipients: r.MaxRecipients},
	}
}

// SendGrid is smtp.sendgrid.net with an API key that may send mail ("Mail Send"). It has SendGrid's classic allowance, 10
// connections and 100 messages on each. Since 2020 its page "Integrating with the SMTP API" says 10,000 connections and 5,000
// messages: raise Limits.MaxConns and Limits.MaxMessagesPerConn to make use of that.
func SendGrid(key string) smtprelay.Config { return config("sendgrid", "", "", key) }

// SendGridEU is smtp.eu.sendgrid.net, for the key of a subuser in the EU. See [SendGrid] for its limits.
func SendGridEU(key string) smtprelay.Config { return config("sendgrid", "eu", "", key) }

// SES is Amazon SES in a region such as "eu-west-1", with the SMTP user name and password made for SES, which are not the AWS keys.
// 50 recipients are allowed in one transaction; how many connections, and messages on each, is not published: the Client learns
// that from replies.
func SES(region, username, password string) smtprelay.Config {
	return config("ses", region, username, password)
}

// Mailgun is smtp.mailgun.org. The user name is postmaster@DOMAIN or another login of the domain.
func Mailgun(username, password string) smtprelay.Config {
	return config("mailgun", "", username, password)
}

// MailgunEU is smtp.eu.mailgun.org, for domains in the EU. See [Mailgun].
func MailgunEU(username, password string) smtprelay.Config {
	return config("mailgun", "eu", username, password)
}

// Postmark is smtp.postmarkapp.com, for the transactional streams of the server with that token. 10 connections are advised and
// 50 recipients allowed in one transaction. It has no port of implicit TLS.
func Postmark(token string) smtprelay.Config { return config("postmark", "", "", token) }

// PostmarkBroadcasts is smtp-broadcasts.postmarkapp.com, for the broadcast streams. See [Postmark].
func PostmarkBroadcasts(token string) smtprelay.Config {
	return config("postmark", "broadcasts", "", token)
}

// Mailjet is in-v3.mailjet.com with an API key and its secret key.
func Mailjet(key, secret string) smtprelay.Config { return config("mailjet", "", key, secret) }

// Brevo is smtp-relay.brevo.com with the SMTP login and an SMTP key, which is not an API key.
func Brevo(login, key string) smtprelay.Config { return config("brevo", "", login, key) }

// Resend is smtp.resend.com with an API key.
func Resend(key string) smtprelay.Config { return config("resend", "", "", key) }

// SparkPost is smtp.sparkpostmail.com with an API key. 100 messages on a connection are advised, and an idle connection is closed
// after a minute. For a subaccount set Username to "SMTP_Injection:X-MSYS-SUBACCOUNT=" and its number. It has no port of implicit
// TLS.
func SparkPost(key string) smtprelay.Config { return config("sparkpost", "", "", key) }

// SparkPostEU is smtp.eu.sparkpostmail.com. See [SparkPost].
func SparkPostEU(key string) smtprelay.Config { return config("sparkpost", "eu", "", key) }

// Mailtrap is live.smtp.mailtrap.io with an API token: 10 connections for an account and 100 messages on each.
func Mailtrap(token string) smtprelay.Config { return config("mailtrap", "", "", token) }

// Gmail is smtp.gmail.com with the full address and an app password. For OAuth leave both empty and set Auth. It takes 500
// messages a day, and 2,000 with Workspace.
func Gmail(address, appPassword string) smtprelay.Config {
	return config("gmail", "", address, appPassword)
}

// Microsoft365 is smtp.office365.com with OAuth: auth returns the mechanism for each connection. 3 connections are allowed for a
// mailbox, 30 messages a minute and 10,000 recipients a day. It has no port of implicit TLS.
func Microsoft365(auth func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error)) smtprelay.Config {
	cfg := config("microsoft365", "", "", "")
	cfg.Auth = auth
	return cfg
}

// LAN is a Postfix, an Exim or the like on the local network, at port 25 and without authentication. Postfix allows a client 50
// connections, and Exim 1,000 messages on each. For a relay without TLS also set TLS to smtprelay.TLSNone.
func LAN(host string) smtprelay.Config {
	return smtprelay.Config{Addr: net.JoinHostPort(host, "25")}
}

// Mailpit is a Mailpit on this machine, which keeps the mail of a program in development and shows it in a browser, at
// http://localhost:8025 if nothing else is set. For one in another container set Addr, and TLS to smtprelay.TLSNone.
func Mailpit() smtprelay.Config { return config("mailpit", "", "", "") }
